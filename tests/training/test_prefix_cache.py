"""States of frozen layers that are kept change nothing but the time: losses, gradients, metrics, weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.models import SHAPE, saved
from support.parity import EXACT, close, run, spec_of, trainer, workload_of

from lorasweep.training import engine, prefix_cache, tensor_store

pytestmark = pytest.mark.usefixtures("always_together")

OFF = "train.prefix_cache_gib=0"
LATE = ("lora.layers_to_transform=[2,3]", "train.max_steps=12", "train.eval_every=5", "lora.lora_dropout=0.2")
"""40 examples in batches of 4: from step 11 on, all of them are known."""

LAST = ("lora.layers_to_transform=[3]", "train.max_steps=12", "train.eval_every=5", "train.seed=3", "lora.r=7")


def chats(folder: Path) -> Path:
    """Return a folder with questions and answers."""
    folder.mkdir()
    for split, count in (("train", 40), ("eval", 6), ("test", 6)):
        lines = [json.dumps({"q": f"what follows {i} in {split}?", "a": str(i + 1)}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of models of several families, with four layers each."""
    root, t = tmp_path_factory.mktemp("families"), transformers
    t5 = t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, decoder_start_token_id=0)
    return {
        "bert": saved(t.BertConfig(**SHAPE), t.AutoModel, root / "bert"),
        "llama": saved(t.LlamaConfig(**SHAPE, num_key_value_heads=2), t.AutoModelForCausalLM, root / "llama"),
        "gpt2": saved(t.GPT2Config(n_embd=32, n_layer=4, n_head=4), t.AutoModelForCausalLM, root / "gpt2"),
        "distilbert": saved(t.DistilBertConfig(dim=32, n_layers=4, n_heads=4, hidden_dim=64), t.AutoModel, root / "d"),
        "t5": saved(t5, t.AutoModelForSeq2SeqLM, root / "t5"),
        "chat": chats(root / "chat"),
        "albert": saved(t.AlbertConfig(**SHAPE, embedding_size=16), t.AutoModel, root / "albert"),
    }


def both(task: str, folder: Path, trials: list[tuple[str, ...]], width: int, *more: str) -> prefix_cache.Prefix:
    """Run trials with kept states and without, compare, and return what kept them."""
    on, off = (ran([(*one, *last) for one in trials], width, task, folder, *more) for last in ((), (OFF,)))
    assert not off[1].costs
    for i in range(len(trials)):
        assert on[0][i].losses and on[0][i].metrics and on[0][i].gradients
        close(on[0][i], off[0][i], EXACT)
    return on[1]


def ran(trials: list[tuple[str, ...]], width: int, task: str, folder: Path, *more: str):
    """Run trials; return what each showed, and what kept states."""
    specs = [spec_of(task, folder, *more, *one) for one in trials]
    made = trainer(specs[0], workload_of(task, folder, *more))
    return run(made, [engine.Job(i, s) for i, s in enumerate(specs)], width), made.prefix


def texts(example) -> list[list[int]]:
    """Return an example's further texts."""
    return example.target[0] if isinstance(example.target, tuple) and isinstance(example.target[0], list) else []


def depths(found: prefix_cache.Prefix) -> set[int]:
    """Return of how many layers states were read."""
    return {depth for depth, cost in found.costs.items() if cost.read}


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("seq_cls", "bert"),
        ("token_cls", "bert"),
        ("question_ans", "bert"),
        ("feature_extraction", "bert"),
        ("seq_2_seq_lm", "bert"),
        ("causal_lm", "llama"),
    ],
)
def test_every_task_gives_the_same_with_kept_states(folders, double, task, family, width):
    more = [f"model.decoder={folders[family]}"] if task == "seq_2_seq_lm" else []
    found = both(task, folders[family], [LATE, LAST], width, *more)
    assert 2 in depths(found) <= {2, 3}
    work = workload_of(task, folders[family], *more)
    there = sum(len(e) for split in ("train", "eval") for e in work.examples[split])
    there += sum(len(ids) for split in ("train", "eval") for e in work.examples[split] for ids in texts(e))
    for cost in found.costs.values():
        assert cost.computed <= there, "something was computed twice"
    assert found.costs[2].read > found.costs[2].computed


@pytest.mark.parametrize(
    ("task", "family", "late"),
    [
        ("causal_lm", "gpt2", ("lora.target_modules=[c_attn]", "lora.layers_to_transform=[2,3]")),
        ("seq_cls", "distilbert", ("lora.target_modules=[q_lin]", "lora.layers_to_transform=[2,3]")),
        ("seq_2_seq_lm", "t5", (r"lora.target_modules='.*block\.[23].*\.q'",)),
    ],
)
@pytest.mark.parametrize("width", [1, 2])
def test_families_whose_layers_look_otherwise(folders, double, task, family, late, width):
    found = both(task, folders[family], [(*late, "lora.lora_dropout=0.1"), (*late, "train.seed=2")], width)
    assert depths(found) == {2}


def test_texts_that_the_model_writes_are_computed_as_always(folders, double):
    more = ["data=jsonl", f"data.path={folders['chat']}", "data.prompt_column=q", "data.completion_column=a"]
    more += ["task_type.generate=true", "task_type.generate_samples=null", "task_type.max_new_tokens=4"]
    found = both("causal_lm", folders["llama"], [LAST], 1, *more)
    assert depths(found) == {3}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("bert", ("lora.layers_to_transform=null",)),
        ("bert", ("lora.bias=all",)),
        ("bert", ("lora.modules_to_save=[layer.0.output.dense]",)),
        ("bert", ("lora.modules_to_save=[embeddings.LayerNorm]",)),
        ("bert", ("lora.target_modules=[word_embeddings,value]", "lora.layers_to_transform=null")),
        ("bert", ("model.base_dropout=true",)),
        ("bert", (OFF,)),
        ("albert", ("lora.target_modules=[pooler]", "lora.layers_to_transform=null")),
    ],
)
def test_nothing_is_kept_where_the_first_layers_change(folders, family, more):
    """ALBERT's only layer runs four times."""
    _, found = ran([(*LATE, *more)], 1, "seq_cls", folders[family])
    assert not found.costs and not found.store.on_disk


def test_as_many_layers_are_kept_as_no_trial_changes(folders, double):
    found = both("seq_cls", folders["bert"], [(*LATE, "lora.modules_to_save=[layer.1.output.dense]"), LAST], 2)
    assert 1 in depths(found) <= {1, 3}


FIRST = ("lora.layers_to_transform=[0]", "train.seed=5", "train.max_steps=4")


def test_states_are_read_again_once_a_neighbour_that_adapts_the_first_layer_has_gone(folders, double):
    found = both("seq_cls", folders["bert"], [LATE, FIRST], 2)
    assert depths(found) == {2}


def test_biases_of_adapted_layers_alone_leave_the_first_layers_as_they_are(folders, double):
    found = both("seq_cls", folders["bert"], [(*LATE, "lora.bias=lora_only"), LAST], 2)
    assert 2 in depths(found) <= {2, 3}


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "output_hidden_states"])
def test_nothing_is_kept_of_a_model_that_is_asked_for_more(folders, flag):
    made = trainer(spec_of("seq_cls", folders["bert"], *LATE), workload_of("seq_cls", folders["bert"]))
    if flag == "gradient_checkpointing":
        made.base.model.gradient_checkpointing_enable()
    else:
        made.base.model.config.output_hidden_states = True
    run(made, [engine.Job(0, spec_of("seq_cls", folders["bert"], *LATE))], 1)
    assert not made.prefix.costs


def test_layers_that_later_ones_look_back_at_are_not_left_out(folders, caplog):
    """A last layer that reads what the first one left gets wrong states without it: the first use tells."""
    caplog.set_level("INFO")
    spec = spec_of("seq_cls", folders["bert"], *LATE)
    made = trainer(spec, workload_of("seq_cls", folders["bert"]))
    first, last = (made.base.model.bert.encoder.layer[i] for i in (0, 3))
    seen, own, end = [], first.forward, last.forward

    def noted(*args, **kwargs):
        seen[:] = [own(*args, **kwargs)]
        return seen[0]

    first.forward, last.forward = noted, lambda hidden, *args, **kwargs: end(hidden + seen[0], *args, **kwargs)
    run(made, [engine.Job(0, spec)], 1)
    assert not depths(made.prefix) and "answers otherwise without its first 2 layers" in caplog.text
    assert first.forward is noted


# --- where states are kept -------------------------------------------------------------------------------------------


def test_states_on_disk_give_the_same_as_those_in_memory(folders, double, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "SEGMENT", 40_000)
    folder = folders["bert"]
    small = (*LATE, "train.prefix_cache_gib=0.00004")
    work = workload_of("seq_cls", folder)
    seen = {}
    for name, trial in (("memory", LATE), ("disk", small)):
        spec = spec_of("seq_cls", folder, *trial)
        made = engine.Engine(trainer(spec, work).base, work.task, work.prepared(), tmp_path)
        seen[name] = run(made, [engine.Job(0, spec)], 1)[0]
        store = made.prefix.store
        assert depths(made.prefix) == {2} and not store.full
        assert (store.on_disk > 0) == (name == "disk")
    close(seen["disk"], seen["memory"], 1e-15)
    assert list(tmp_path.iterdir()) == [], "the files have no names"


def test_full_store_keeps_what_it_has_and_the_rest_is_computed(folders, double, monkeypatch):
    monkeypatch.setattr(tensor_store, "SEGMENT", 30_000)
    found = both("seq_cls", folders["bert"], [(*LATE, "train.prefix_cache_gib=0.00008")], 1)
    assert found.store.full and len(found.store._places) > 5


def test_disk_with_little_room_is_left_alone(tmp_path, monkeypatch):
    store = tensor_store.Store(tmp_path)
    monkeypatch.setattr(tensor_store, "SPARE", 2**60)
    assert not store.put((1, b"a"), torch.ones(4)) and store.full


def test_store_keeps_any_type_bit_for_bit(monkeypatch):
    monkeypatch.setattr(tensor_store, "SEGMENT", 64)
    store, values = tensor_store.Store(None), {}
    store.budget = 2**12
    for i, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64, torch.float16)):
        values[i, b""] = torch.randn(3 + i, 5).to(dtype)
        assert store.put((i, b""), values[i, b""])
    for key, value in values.items():
        assert store.get(key).dtype == value.dtype and torch.equal(store.get(key), value)


def test_reading_that_takes_longer_than_computing_is_given_up(folders, monkeypatch):
    monkeypatch.setattr(prefix_cache.Cost, "a_token", property(lambda self: 1e-12))
    _, found = ran([(*LATE, "train.max_steps=30")], 1, "seq_cls", folders["bert"])
    assert found.costs[2].reads == prefix_cache.LOOK_AT


def test_saved_seconds_are_those_of_the_tokens_that_were_read(folders, monkeypatch):
    monkeypatch.setattr(prefix_cache.Cost, "a_token", property(lambda self: 1.0))
    made = trainer(spec_of("seq_cls", folders["bert"], *LATE), workload_of("seq_cls", folders["bert"]))
    todo, ended = [engine.Job(i, spec_of("seq_cls", folders["bert"], *LATE)) for i in (1, 0)], []
    made.width = 1
    for event in made.run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.TrialEnded):
            ended.append(event)
    work = workload_of("seq_cls", folders["bert"])
    train, evaluated = (sum(len(e) for e in work.examples[s]) for s in ("train", "eval"))
    assert ended[0].prefix_saved_s["eval"] == pytest.approx(2 * evaluated, abs=1), "the first of three computes"
    assert ended[1].prefix_saved_s["eval"] == pytest.approx(3 * evaluated, abs=1)
    assert 0 < ended[0].prefix_saved_s["train"] < 0.4 * train, "two of twelve batches come again"
    assert ended[1].prefix_saved_s["train"] > train


def test_layers_that_compute_again_begin_behind_the_kept_ones(folders, double):
    again = "train.gradient_checkpointing=true"
    found = both("seq_cls", folders["bert"], [(*LATE, again), (*LATE, again, "train.seed=7")], 2)
    assert depths(found) == {2}
