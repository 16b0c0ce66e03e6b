"""Where a model computes each row of a batch by itself is found by trying, for every encoder of transformers."""

import contextlib
import signal

import pytest
import torch
import transformers
from support import parity
from support.models import SHAPE, wordpiece
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lorasweep.config import compose
from lorasweep.config.spec import TaskSpec
from lorasweep.models import row_order
from lorasweep.tasks import make
from lorasweep.tasks.task import Example
from lorasweep.training import engine, first_token, workload

TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_inner", "n_inner", "hidden_dim", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "n_positions"), 64),
    **{"d_kv": 8, "head_dim": 8, "vocab_size": 200, "pad_token_id": 0, "num_labels": 3},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
MOST_PARAMETERS = 2e7


def classifier(kind: str) -> nn.Module:
    """Return a tiny classifier of a family; fails for one that cannot be made tiny."""
    config = transformers.AutoConfig.for_model(kind)
    for key, value in TINY.items():
        with contextlib.suppress(Exception):
            if hasattr(config, key):
                setattr(config, key, value)
    if (getattr(config, "hidden_size", 32) or 32) * (getattr(config, "num_hidden_layers", 2) or 2) > 2000:
        raise ValueError("large")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise ValueError("large")
    return model


def texts(lengths: list[int], seed: int) -> list[Example]:
    """Return texts of random tokens, which end in </s> for those that look for it."""
    random = torch.Generator().manual_seed(seed)
    rows = [[*torch.randint(5, 199, (n - 1,), generator=random).tolist(), 2] for n in lengths]
    return [Example(row=i, inputs={"input_ids": ids}, target=0, supervised=1) for i, ids in enumerate(rows)]


def collated(task, examples) -> dict:
    return dict(task.collate([examples], 0).inputs)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def xlnet(kind: str) -> nn.Module:
    config = transformers.XLNetConfig(vocab_size=200, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0)
    config.summary_type = kind
    torch.manual_seed(0)
    return transformers.XLNetForSequenceClassification(config).eval()


@pytest.mark.parametrize("length", [3, 4, 6, 9])
def test_layers_that_see_the_tokens_first_are_named_and_the_head_is_not(length):
    model = xlnet("first")
    found = row_order.scattered(model, collated(make(TaskSpec(name="SEQ_CLS")), texts([length], 0)))
    names = {name for name, module in model.named_modules() if module in found}
    assert "transformer.layer.0.ff.layer_1" in names and "transformer.layer.1" in names
    assert "logits_proj" not in names and "" not in names


def test_modules_that_see_positions_in_place_of_rows_are_named():
    config = transformers.T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = transformers.T5EncoderModel(config).eval()
    inputs = collated(make(TaskSpec(name="SEQ_CLS")), texts([6], 0))
    names = {name for name, module in model.named_modules() if module in row_order.scattered(model, inputs)}
    assert any("relative_attention_bias" in name for name in names)
    assert not any(name.endswith((".q", ".wi", ".wo")) for name in names)


@pytest.mark.parametrize("kind", ["first", "last", "mean"])
def test_first_token_is_never_taken_from_a_model_that_sees_the_tokens_first(kind):
    task = make(TaskSpec(name="SEQ_CLS"))
    assert first_token.find(xlnet(kind), collated(task, texts([4, 9, 6], 0))) is None


def test_classifier_that_reads_the_last_token_is_padded_on_the_left():
    tokenizer, task = wordpiece(), make(TaskSpec(name="SEQ_CLS"))
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=4, d_inner=64)
    model = transformers.XLNetForSequenceClassification(config).eval()  # summary_type is last
    tokenizer.padding_side = "right"
    task.padding_side = row_order.padding_side(model, tokenizer)
    assert task.padding_side == "left"
    rows = texts([4, 9, 6], 0)
    alone = [collated(task, [e]) for e in rows]
    assert not row_order.depends_on_padding(row_order.of_model(model), alone, collated(task, rows), "left")
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE)).eval()
    tokenizer.padding_side = "left"
    assert row_order.padding_side(bert, tokenizer) == "right", "positions count from the left"


DEPENDENT = {
    "fnet": transformers.FNetConfig(**{k: v for k, v in SHAPE.items() if k != "num_attention_heads"}),
    "nystromformer": transformers.NystromformerConfig(**SHAPE, num_landmarks=4, segment_means_seq_len=4),
    "yoso": transformers.YosoConfig(**SHAPE),
}


@pytest.mark.parametrize("family", [*DEPENDENT, "bert"])
def test_rows_that_padding_changes_are_found(family):
    config = DEPENDENT.get(family, transformers.BertConfig(**SHAPE))
    torch.manual_seed(0)
    model, task = (
        transformers.AutoModelForSequenceClassification.from_config(config).eval(),
        make(TaskSpec(name="SEQ_CLS")),
    )
    rows = texts([12, 7, 9], 0)
    found = row_order.depends_on_padding(
        row_order.of_model(model), [collated(task, [e]) for e in rows], collated(task, rows)
    )
    assert found is (family != "bert")


def test_model_that_reads_characters_trains_alone(tmp_path):
    """CANINE hashes its ids, so that it has no table of them, and shortens a text by steps of a fixed width."""
    sizes = {k: v for k, v in SHAPE.items() if k != "num_hidden_layers"}
    config = transformers.CanineConfig(**sizes, num_hidden_layers=1, num_hash_buckets=64, local_transformer_stride=16)
    torch.manual_seed(0)
    transformers.CanineModel(config).save_pretrained(tmp_path)
    transformers.CanineTokenizer().save_pretrained(tmp_path)
    small = ["data.max_train_samples=16", "data.max_eval_samples=4", "train.max_steps=2", "train.batch_size=4"]
    spec = compose.compose_trial(["task_type=seq_cls", f"model.pretrained={tmp_path}", "data.max_tokens=64", *small])
    made = parity.trainer(spec, workload.workload(spec))
    assert "answers a text otherwise beside a longer one" in made.traits.alone
    assert parity.run(made, [engine.Job(0, spec)], 1)[0].state == "COMPLETE"


@contextlib.contextmanager
def at_most(seconds: int):
    """Raise TimeoutError in what takes longer."""

    def end(*_):
        raise TimeoutError(f"takes over {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
def test_every_classifier_of_transformers_that_can_be_made_tiny(kind):
    """What trying on some texts finds, the first token and the rows that stand by themselves, holds on others."""
    task = make(TaskSpec(name="SEQ_CLS"))
    try:
        with at_most(20):
            model = classifier(kind)
            for lengths in ([12, 7, 9, 5], [2]):  # Funnel raises on a text of two tokens
                model(**collated(task, texts(lengths, 1)))
    except Exception as error:
        pytest.skip(f"{kind} cannot be made tiny: {' '.join(str(error).split())[:80]}")
    probes, others = texts([2, 12, 7], 0), texts([6, 3, 11, 8, 2], 2)  # the shortest is among them, as training has it
    alone = [collated(task, [e]) for e in probes]
    dependent = row_order.depends_on_padding(row_order.of_model(model), alone, collated(task, probes))
    place = first_token.find(model, collated(task, probes))
    with torch.no_grad():
        whole = model(**collated(task, others)).logits
        if place is not None:
            with place.used():
                assert apart(whole, model(**collated(task, others)).logits) < 1e-4
        if not dependent:
            alone = torch.cat([model(**collated(task, [e])).logits for e in others])
            assert apart(whole, alone) < 1e-3
