"""Tokens are made once: what is read again is what was made, and any change makes them anew."""

import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.models import wordpiece

from lorasweep.config import compose
from lorasweep.packing import pass_cost
from lorasweep.tasks import token_cache
from lorasweep.tasks.task import Example, lengths_of
from lorasweep.training import workload

TASKS = ["seq_cls", "causal_lm", "token_cls", "question_ans", "seq_2_seq_lm", "feature_extraction"]


@pytest.fixture
def calls(monkeypatch):
    """Count the tasks' encodings."""
    made: list[str] = []
    encoded = token_cache.encoded

    def counted(task, *rest):
        made.append(task.name)
        return encoded(task, *rest)

    monkeypatch.setattr(token_cache, "encoded", counted)
    return made


def spec_of(task: str, model: Path, outputs: Path, *more: str):
    own = [f"task_type={task}", f"model.pretrained={model}"]
    own += [f"model.decoder={model}"] if task == "seq_2_seq_lm" else []
    own += [f"outputs={outputs}", "data.max_train_samples=30", "data.max_eval_samples=6", "data.max_tokens=24"]
    return compose.compose_trial([*own, *more])


def plain(example: Example) -> Example:
    """Return an example with lists of its tokens."""
    return replace(example, inputs={k: list(map(int, v)) for k, v in example.inputs.items()})


@pytest.mark.parametrize("task", TASKS)
def test_second_start_tokenises_nothing_and_finds_the_same(tiny_bert, tiny_llama, tmp_path, calls, task):
    more = ["task_type.generate=true"] if task == "seq_2_seq_lm" else []
    spec = spec_of(task, tiny_llama if task == "causal_lm" else tiny_bert, tmp_path, *more)
    first = workload.workload(spec)
    made = {split: list(examples) for split, examples in first.examples.items()}
    assert not list(tmp_path.iterdir()), "nothing is written before it is asked for"
    kept, second = first.keep(), workload.workload(spec)
    assert calls == [first.task.name]
    assert vars(second.task).keys() == vars(first.task).keys()
    for name in vars(first.task).keys() - {"spec", "tokenizer", "head"}:
        assert getattr(second.task, name) == getattr(first.task, name), name
    assert (getattr(second.task, "tokenizer", 1) is None) == (getattr(first.task, "tokenizer", 1) is None)
    for split, examples in made.items():
        for found in (kept, second):
            assert isinstance(found.examples[split], token_cache.Examples)
            assert [plain(e) for e in found.examples[split]] == [plain(e) for e in examples]
            assert lengths_of(found.examples[split]) == lengths_of(examples) == [len(e) for e in examples]
        batches = [first.task.collate([e[1:4]], 0) for e in (examples, second.examples[split])] if start(first) else []
        for name in batches[0].inputs if batches else ():
            assert torch.equal(batches[0].inputs[name], batches[1].inputs[name])


def start(work: workload.Workload) -> bool:
    """Tell whether the task can make batches before it has seen a model."""
    return work.task.name != "SEQ_2_SEQ_LM"


def test_chat_keeps_its_stop_token_and_prompts(tmp_path, calls):
    model, data = tmp_path / "model", tmp_path / "data"
    tokenizer = wordpiece()
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %}[CLS] assistant{% endif %}"
    )
    tokenizer.eos_token = "[SEP]"
    transformers.LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.mkdir()
    chat = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine"}]
    for split in ("train", "eval", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps({"m": chat, "i": i}) for i in range(4)))
    more = [
        "data=jsonl",
        f"data.path={data}",
        "data.messages_column=m",
        "data.eval_split=eval",
        "data.test_split=test",
        "task_type.generate=true",
    ]
    spec = spec_of("causal_lm", model, tmp_path / "out", *more)
    first, second = workload.workload(spec).keep(), workload.workload(spec)
    assert len(calls) == 1 and second.task.stop == first.task.stop == (tokenizer.sep_token_id,)
    assert second.examples["eval"][0].info == first.examples["eval"][0].info != None  # noqa: E711


def copied(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def with_a_new_word(model: Path, to: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied(model, to))
    tokenizer.add_tokens(["grommet"])
    tokenizer.save_pretrained(to)
    network = transformers.AutoModelForMaskedLM.from_pretrained(to)
    network.resize_token_embeddings(len(tokenizer))  # a decoder needs a vector for the new word
    network.save_pretrained(to)
    return to


@pytest.mark.parametrize("change", ["file", "tokenizer", "max_tokens", "prefix", "version", "code", "task"])
def test_any_change_makes_the_tokens_anew(tiny_bert, tmp_path, calls, monkeypatch, change):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "eval", "test"):
        rows = [f"source {split} {i},target {i}" for i in range(8)]
        (data / f"{split}.csv").write_text("\n".join(["source,target", *rows]))
    more = ["data=csv", f"data.path={data}", "data.eval_split=eval", "data.test_split=test"]
    before = spec_of("seq_2_seq_lm", tiny_bert, tmp_path / "out", *more)
    workload.workload(before).keep()
    workload.workload(spec_of("seq_2_seq_lm", copied(tiny_bert, tmp_path / "same"), tmp_path / "out", *more))
    assert len(calls) == 1, "the same model in another folder"
    after = before
    if change == "file":
        (data / "eval.csv").write_text((data / "eval.csv").read_text().replace("source eval", "another one"))
    elif change == "tokenizer":
        after = spec_of("seq_2_seq_lm", with_a_new_word(tiny_bert, tmp_path / "new"), tmp_path / "out", *more)
    elif change == "version":
        monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name: "99")
    elif change == "code":
        (tmp_path / "other.py").write_text("")
        monkeypatch.setattr(token_cache, "_code", lambda task: [tmp_path / "other.py"])
    else:
        line = {"max_tokens": "data.max_tokens=5", "prefix": "data.source_prefix='say: '"}
        after = spec_of("seq_2_seq_lm", tiny_bert, tmp_path / "out", *more, line.get(change, "task_type.generate=true"))
    workload.workload(after).keep()
    assert len(calls) == 2
    workload.workload(after)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["short", "flipped", "gone", "about", "list"])
def test_damaged_store_is_made_again(tiny_bert, tmp_path, calls, caplog, damage):
    spec = spec_of("seq_cls", tiny_bert, tmp_path)
    work = workload.workload(spec).keep()
    expected = [plain(e) for e in work.examples["train"]]
    ids, about = work.place / "train.ids.npy", work.place / "about.json"
    content = ids.read_bytes()
    match damage:
        case "short":
            ids.write_bytes(content[:-20])
        case "flipped":
            ids.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "gone":
            ids.unlink()
        case "about":
            about.write_text(about.read_text()[:-30])
        case "list":
            about.write_text("[]")
    again = workload.workload(spec).keep()
    assert len(calls) == 2 and "is damaged and is made again" in caplog.text
    assert [plain(e) for e in again.examples["train"]] == expected
    workload.workload(spec)
    assert len(calls) == 2 and [p.name for p in work.place.parent.iterdir()] == [work.place.name]


def test_store_runs_nothing_that_is_in_it(tiny_bert, tmp_path):
    """A pickle that calls a function is refused."""
    rest = pickle.dumps(print)
    found = token_cache.Examples(
        ["input_ids"],
        (),
        np.zeros((1, 1), np.int32),
        np.array([[0, 1, 0, 1, len(rest)]]),
        np.frombuffer(rest, np.uint8),
    )
    with pytest.raises(pickle.UnpicklingError, match="no plain value"):
        found[0]


def test_values_that_could_not_be_read_back_are_not_kept(tiny_bert, tmp_path, caplog):
    work = workload.workload(spec_of("seq_cls", tiny_bert, tmp_path))
    work.examples["eval"] = [replace(e, info=Path("x")) for e in work.examples["eval"]]
    work.keep()
    assert not work.place.exists() and "the tokens are not kept" in caplog.text
    assert not list(work.place.parent.iterdir()) and work.examples["eval"][0].info == Path("x")


def test_folder_that_cannot_be_written_leaves_the_tokens_in_memory(tiny_bert, tmp_path, caplog):
    (tmp_path / ".tokens").write_text("a file is in the way")
    work = workload.workload(spec_of("seq_cls", tiny_bert, tmp_path)).keep()
    assert isinstance(work.examples["train"], list) and "the tokens are not kept" in caplog.text


def _keep(model: Path, outputs: Path, barrier, results) -> None:
    spec = spec_of("seq_cls", model, outputs)
    work = workload.workload(spec)
    barrier.wait()
    work.keep()
    results.put((type(work.examples["train"]).__name__, [plain(e) for e in work.examples["train"]]))


def test_processes_that_start_at_once_all_come_out_right(tiny_bert, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    started = [context.Process(target=_keep, args=(tiny_bert, tmp_path, barrier, results)) for _ in range(3)]
    for process in started:
        process.start()
    found = [results.get(timeout=240) for _ in started]
    for process in started:
        process.join()
    assert [name for name, _ in found] == ["Examples"] * 3 and found[0] == found[1] == found[2]
    (folder,) = (tmp_path / ".tokens").iterdir()
    assert token_cache.read(folder, ()) is not None and not (folder / "damaged").exists()


def test_batches_of_kept_tokens_are_those_of_lists(tiny_bert, tmp_path):
    """Steps and the choice of slots look at the lengths, and read no more examples than they give out."""
    spec = spec_of("seq_cls", tiny_bert, tmp_path)
    work = workload.workload(spec)
    lists = list(work.examples["train"])
    kept = work.keep().examples["train"]
    assert pass_cost.width(50.0, spec.train, kept) == pass_cost.width(50.0, spec.train, lists)
    assert [plain(e) for e in kept[-3:]] == [plain(e) for e in lists[-3:]]
    with pytest.raises(IndexError):
        kept[len(lists)]
