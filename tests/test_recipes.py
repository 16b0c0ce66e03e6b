"""What CONTRIBUTING.md says to write works as it stands there, and so do the scripts of examples/."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import optuna
import pytest
import torch
from support import studies
from support.models import wordpiece

import lorasweep
from lorasweep import tasks
from lorasweep.config import compose, registry
from lorasweep.config.spec import DataSpec
from lorasweep.data import readers
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.search import pruners, samplers
from lorasweep.tasks import metric

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8"), flags=re.MULTILINE | re.DOTALL
)
REGISTRIES = (
    *(registry.TASKS, registry.READERS, registry.METRICS),
    *(registry.SAMPLERS, registry.PRUNERS, registry.INITS),
)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Leave the registries as they were."""
    for name in registry.TASKS:
        tasks.kind(name)  # a task's file registers it once, when it is first imported
    for entries in REGISTRIES:
        len(entries)
        monkeypatch.setattr(entries, "_entries", dict(entries._entries))
    monkeypatch.setattr(metric, "COMBINATIONS", dict(metric.COMBINATIONS))


def module(path: Path) -> ModuleType:
    """Import a file by its path; it stays known under its name, as an imported one does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def example(name: str) -> ModuleType:
    return module(ROOT / "examples" / f"{name}.py")


@pytest.fixture
def written(tmp_path) -> Callable[[str], ModuleType]:
    """Return a function that imports the recipe that defines a name, as a file of somebody's own."""

    def imported(name: str) -> ModuleType:
        (block,) = [b for b in BLOCKS if re.search(rf"^(def |class |){name}\b", b, re.MULTILINE)]
        (tmp_path / f"recipe_{name}.py").write_text(block, encoding="utf8")
        return module(tmp_path / f"recipe_{name}.py")

    return imported


@pytest.fixture
def small(tiny_bert, tmp_path) -> list[str]:
    """Return settings with which a trial takes a second."""
    return [*studies.SMALL, f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", "tracking=none"]


# --- CONTRIBUTING.md -------------------------------------------------------------------------------------------------


def test_every_recipe_is_tried():
    assert len(BLOCKS) == 6


def test_metric_ranks_trials(small, written):
    written("exact_share")
    result = lorasweep.run(["task_type.primary=exact_share", *small])
    assert result["state"] == "COMPLETE" and result["metric"]["name"] == "exact_share"
    assert result["metrics"]["exact_share"] == result["metrics"]["accuracy"]


def test_reader_reads(tmp_path, written):
    written("read_lines")
    (tmp_path / "a.lines").write_text("low|roses are red\nhigh|violets are blue\n")
    spec = compose.compose_trial(["data.source=lines", f"data.path={tmp_path}/a.lines"]).data
    assert readers.read_splits(spec)["train"].rows[1] == {"text": "violets are blue", "label": "high"}
    assert readers.files_of(DataSpec(source="lines", path=str(tmp_path), train_split="a"))[0]["train"]


def test_sampler_draws(written):
    written("halton")
    search = compose.compose_trial(["search.sampler=halton"]).search
    study = optuna.create_study(sampler=samplers.make_sampler(search, 0))
    assert len({study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"] for _ in range(4)}) == 4


def test_pruner_ends_what_does_not_improve(written):
    written("patient")
    search = compose.compose_trial(["search.pruner=patient"]).search
    study = optuna.create_study(pruner=pruners.make_pruner(search, 64), direction="maximize")
    trial = study.ask()
    ended = []
    for step, value in enumerate([0.9, *[0.1] * 8]):
        trial.report(value, step)
        ended.append(trial.should_prune())
    assert not ended[0] and ended[-1]


def test_initialisation_begins_so(tiny_bert, written):
    written("smaller")
    task = tasks.make(compose.compose_trial([]).task_type)
    task.classes = ["no", "yes"]

    def largest(init: str) -> float:
        spec = compose.compose_trial([f"model.pretrained={tiny_bert}", f"lora.init_lora_weights={init}"])
        base = base_model.load(spec.model, spec.train, task, base_model.load_tokenizer(spec.model))
        attached = adapter.attach(base, spec.lora, spec.task_type, 0, list)
        return max(p.abs().max().item() for n, p in attached.named.items() if ".lora_A." in n)

    assert largest("small") == pytest.approx(0.1 * largest("true"))


def test_task_reads_as_it_says(small, written):
    cls = written("ReversedText").ReversedText
    task = cls(compose.compose_trial(["task_type.name=REVERSED_TEXT"]).task_type)
    task.classes = ["no", "yes"]
    plain = tasks.kind("SEQ_CLS")(task.spec)
    plain.classes = task.classes
    found, same = (
        t.encode([{"text": text, "label": "no"}], wordpiece(), DataSpec(max_tokens=32))[0].inputs
        for t, text in ((task, "the word"), (plain, "drow eht"))
    )
    assert found == same
    assert lorasweep.run(["task_type.name=REVERSED_TEXT", *small])["state"] == "COMPLETE"


# --- examples/ -------------------------------------------------------------------------------------------------------


def test_example_of_ranks_runs(small, capsys):
    assert example("ranks").main(small, ranks=(1, 2)) in (1, 2)
    assert "r=1: accuracy 0." in capsys.readouterr().out


def test_example_of_a_metric_is_the_mean_recall_of_sklearn(small):
    from sklearn.metrics import balanced_accuracy_score

    own = example("own_metric")
    result = lorasweep.run(["task_type.primary=mean_recall", *small])
    assert result["state"] == "COMPLETE" and result["metric"]["name"] == "mean_recall"
    predicted, true = [0, 1, 1, 2, 0, 2], [0, 1, 2, 2, 1, 2]
    rows = [{"row": i, "prediction": p, "label": t} for i, (p, t) in enumerate(zip(predicted, true, strict=True))]
    assert registry.METRICS.get("SEQ_CLS.mean_recall").value(rows) == pytest.approx(
        balanced_accuracy_score(true, predicted)
    )
    assert own.mean_recall(torch.ones(3, 6).numpy(), predicted, true).shape == (3,)


def test_example_of_a_reader_trains_on_mails(small, tmp_path, monkeypatch):
    example("own_reader")
    mails = [
        f"From me@example.org Mon Jan  1 00:00:00 2024\nFrom: me@example.org\nSubject: number {i} of {i % 3}\n"
        f"X-Spam-Flag: {('YES', 'NO')[i % 2]}\n\nbody\n\n"
        for i in range(60)
    ]
    (tmp_path / "train.mbox").write_text("".join(mails))
    result = lorasweep.run(["data.source=mbox", f"data.path={tmp_path}/train.mbox", *small])
    assert result["state"] == "COMPLETE"
