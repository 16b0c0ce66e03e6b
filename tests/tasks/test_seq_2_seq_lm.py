"""SEQ_2_SEQ_LM: transformers' loss of T5, BART and two BERTs, the new cross-attention, generated text, scores."""

from pathlib import Path

import pytest
import torch
import transformers
from support import real_data
from support.models import wordpiece

from lorasweep.config.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec, TrainSpec
from lorasweep.data import builtin, dataset
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.tasks import generation, lm_head, make
from lorasweep.tasks.seq_2_seq_lm import Seq2SeqLM
from lorasweep.tasks.task import IGNORE

E2E = real_data.FOLDER / "e2e-nlg"
ROWS = [
    {"source": "name[Blue Spice], area[riverside]", "target": "The Blue Spice lies at the riverside."},
    {"source": "name[Alimentum]", "target": "Alimentum"},
    {"source": "name[Blue Spice], area[riverside]", "target": "By the river: Blue Spice."},
    {"source": "near[Crowne Plaza Hotel], food[English], price[cheap]", "target": "Cheap English food."},
    {"source": "area[city centre]", "target": "It is in the centre of the city, not far from anything."},
]


def task_of(**keys) -> Seq2SeqLM:
    task = make(TaskSpec(name="SEQ_2_SEQ_LM", **keys))
    assert isinstance(task, Seq2SeqLM)
    return task


def t5(tied: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(wordpiece()),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        vocab_size=len(wordpiece()), d_model=32, **sizes, **heads, pad_token_id=0, decoder_start_token_id=102
    )
    built = transformers.BartForConditionalGeneration(config).eval()
    built.final_logits_bias.normal_()
    return built


def two_berts(folder: Path) -> base_model.Base:
    spec = ModelSpec(pretrained=str(folder), decoder=str(folder))
    return base_model.load(spec, TrainSpec(device="cpu"), task_of(), wordpiece())


def batches(task: Seq2SeqLM, built, spec: DataSpec | None = None):
    task.trim(built)
    examples = task.encode(ROWS, wordpiece(), spec or DataSpec())
    return [task.collate([part], 0) for part in (examples[:2], examples[2:], examples)]


@pytest.fixture(params=["t5", "t5_tied", "bart", "two_berts"])
def built(request, tiny_bert):
    if request.param == "two_berts":
        return two_berts(tiny_bert).model
    return bart() if request.param == "bart" else t5(request.param == "t5_tied")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_is_that_of_transformers(built, monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 4 * len(wordpiece()))
    built.requires_grad_(False)
    task = task_of()
    for batch in batches(task, built):
        inputs = {k: batch.inputs[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            theirs = built(**inputs, labels=batch.labels).loss
            ours = task.row_losses(built, batch).sum() / batch.supervised
            found = task.metrics(task.predict(built, batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert found["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_head_is_read_in_chunks_unless_the_model_changes_its_logits(tiny_bert):
    plain = bart()
    plain.final_logits_bias.zero_()
    for built, full in ((t5(True), False), (bart(), True), (plain, False), (two_berts(tiny_bert).model, False)):
        built.requires_grad_(False)
        task = task_of()
        task.row_losses(built, batches(task, built)[0])
        assert (task.head.change is None) is full


def test_gradients_are_those_of_full_logits(tiny_bert, monkeypatch):
    base = two_berts(tiny_bert)
    attached = adapter.attach(base, LoraSpec(r=4, init_lora_weights=False), TaskSpec(name="SEQ_2_SEQ_LM"), 0)
    net, task = attached.peft_model.base_model.model, task_of()
    batch = batches(task, net)[2]
    found = []
    for full in (False, True):
        if full:
            monkeypatch.setattr(lm_head, "is_frozen", lambda _: False)
        attached.peft_model.zero_grad()
        task.row_losses(net, batch).sum().backward()
        found.append([p.grad.clone() for p in attached.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_target_ends_with_the_end_token_and_bert_begins_without_one(tiny_bert):
    tokenizer = wordpiece()
    base = two_berts(tiny_bert)
    batch = batches(task_of(), base.model, DataSpec(max_target_tokens=6))[0]
    labels = batch.labels[1][batch.labels[1] != IGNORE].tolist()
    assert labels == [*tokenizer("Alimentum", add_special_tokens=False)["input_ids"][:5], tokenizer.sep_token_id]
    decoder = batch.inputs["decoder_input_ids"]
    assert decoder[:, 0].tolist() == [tokenizer.cls_token_id] * 2
    assert decoder[1, 1 : len(labels)].tolist() == labels[:-1]
    assert torch.equal(decoder, base.model.prepare_decoder_input_ids_from_labels(batch.labels))


def test_source_prefix_stands_before_every_source():
    examples = task_of().encode(ROWS[:1], wordpiece(), DataSpec(source_prefix="Tell: "))
    assert wordpiece().decode(examples[0].inputs["input_ids"]).startswith("[CLS] tell : name")


# --- two checkpoints -------------------------------------------------------------------------------------------------


def test_new_parts_are_cross_attention_and_the_head_without_the_tied_word_vectors(tiny_bert):
    base = two_berts(tiny_bert)
    cross = [n for n in base.missing if ".crossattention." in n]
    assert len(cross) == 2 * 5
    assert sorted(set(base.missing) - set(cross)) == [
        "decoder.cls.predictions.transform.LayerNorm",
        "decoder.cls.predictions.transform.dense",
    ]
    head = base.model.get_output_embeddings()
    assert head.weight is base.model.decoder.get_input_embeddings().weight and not head.bias.any()


def test_new_parts_and_nothing_else_train_in_full(tiny_bert):
    base = two_berts(tiny_bert)
    attached = adapter.attach(base, LoraSpec(r=4), TaskSpec(name="SEQ_2_SEQ_LM"), 0)
    names = [n for n, m in attached.peft_model.base_model.model.named_modules() if hasattr(m, "modules_to_save")]
    assert sorted(names) == sorted(base.missing)
    adapted = [n for n, m in attached.peft_model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 2 * 2 * 6 and not any("crossattention" in n for n in adapted)


def test_new_parts_are_drawn_from_the_seed(tiny_bert):
    base = two_berts(tiny_bert)
    key = base.model.get_submodule(next(n for n in base.missing if n.endswith("self.key"))).weight
    drawn = []
    for seed in (1, 2, 1):
        base_model.renew_missing(base, seed)
        drawn.append(key.clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_adapter_reloads_onto_a_fresh_base_with_equal_logits(tiny_bert, tmp_path):
    base = two_berts(tiny_bert)
    lora, kind = LoraSpec(r=4, init_lora_weights=False), TaskSpec(name="SEQ_2_SEQ_LM")
    attached = adapter.attach(base, lora, kind, 3)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    net = attached.peft_model.base_model.model
    batch = batches(task_of(), net)[2]
    adapter.save(attached, tmp_path)
    again = adapter.reload(tmp_path, two_berts(tiny_bert), lora, kind).base_model.model
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs).logits, net(**batch.inputs).logits)


def test_skeleton_has_the_names_of_the_loaded_model(tiny_bert):
    spec = ModelSpec(pretrained=str(tiny_bert), decoder=str(tiny_bert))
    bare = base_model.skeleton(spec, task_of(), wordpiece()).model
    loaded = two_berts(tiny_bert).model
    assert [n for n, _ in bare.named_modules()] == [n for n, _ in loaded.named_modules()]
    assert next(bare.parameters()).is_meta


def test_decoder_is_for_seq_2_seq_lm_and_needs_cross_attention(tiny_bert, tiny_llama):
    train = TrainSpec(device="cpu")
    spec = ModelSpec(pretrained=str(tiny_bert), decoder=str(tiny_bert))
    with pytest.raises(ConfigError, match=r"model\.decoder: FEATURE_EXTRACTION takes no joined model"):
        base_model.load(spec, train, make(TaskSpec(name="FEATURE_EXTRACTION")), wordpiece())
    with pytest.raises(ConfigError, match=r"model\.decoder: LlamaForCausalLM cannot have cross-attention"):
        base_model.load(ModelSpec(pretrained=str(tiny_bert), decoder=str(tiny_llama)), train, task_of(), wordpiece())


# --- generated text --------------------------------------------------------------------------------------------------


def test_each_source_is_answered_once_and_scored_against_all_of_its_targets(tiny_bert):
    task = task_of(generate=True, max_new_tokens=5)
    batch = batches(task, two_berts(tiny_bert).model)[2]
    assert [bool(i) for i in batch.infos] == [True, True, False, True, True]
    assert batch.infos[0] == [ROWS[0]["target"], ROWS[2]["target"]]
    with torch.inference_mode():
        found = task.predict(two_berts(tiny_bert).model, batch)
    assert [p["row"] for p in found if "text" in p] == [0, 1, 3, 4]
    assert set(task.metrics(found)) == set(task.metric_names) >= {"rouge_l", "bleu", "chrf"}


def test_generate_samples_limits_the_sources():
    task = task_of(generate=True, generate_samples=2)
    assert sum(bool(e.info) for e in task.encode(ROWS, wordpiece(), DataSpec())) == 2
    assert len(generation.chosen(10, 3)) == 3 and generation.chosen(2, None) == {0, 1}


def scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    pairs = enumerate(zip(texts, references, strict=True))
    predictions = [{"row": row, "text": text, "references": refs} for row, (text, refs) in pairs]
    return {m.name: m.value(predictions) for m in generation.measures()}


def test_scores_of_equal_texts_are_one_and_of_strangers_zero():
    texts = ["The cat sat on the mat today.", "我们喜欢读书。"]
    assert scores(texts, [[t] for t in texts]) == pytest.approx({"rouge_l": 1, "bleu": 1, "chrf": 1})
    other = scores(["zzz"], [["A cat sat."]])
    assert other == {"rouge_l": 0, "bleu": 0, "chrf": 0}


def test_rouge_l_by_hand():
    found = scores(["the cat sat down"], [["a dog", "the black cat sat"]])
    assert found["rouge_l"] == pytest.approx(2 * (3 / 4) * (3 / 4) / (3 / 4 + 3 / 4))
    assert scores(["我爱书"], [["我读书"]])["rouge_l"] == pytest.approx(2 / 3)


def test_bleu_by_hand():
    found = scores(["a b c d e"], [["a b c d f"]])
    assert found["bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


# --- data ------------------------------------------------------------------------------------------------------------


def test_builtin_rows_name_functions_and_do_not_give_the_name_away():
    rows = builtin.naming()
    assert len(rows) > 500
    assert len({r["source"].casefold() for r in rows}) == len(rows)
    assert builtin.in_words("_getHTTPFile_names2") == "get http file names 2"


@real_data.needs("e2e-nlg")
def test_targets_of_one_source_stay_in_one_split():
    spec = DataSpec(source="csv", path=str(E2E), train_split="devset", test_split="testset_w_refs")
    found = dataset.load(spec, {"source": "mr", "target": "ref"}, "SEQ_2_SEQ_LM")
    assert sum(map(len, found.splits.values())) == 4672 + 4693
    train, held = ({r["source"] for r in found.splits[s]} for s in ("train", "eval"))
    assert train and held and not train & held
