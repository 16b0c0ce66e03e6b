"""Names in the settings: from conf/ and from entry points, known before anybody's code is imported."""

import subprocess
import sys

import optuna
import pytest
from support import outside

from lorasweep.config import compose, registry
from lorasweep.config.spec import DataSpec
from lorasweep.data import readers
from lorasweep.errors import ConfigError
from lorasweep.search import pruners, samplers

POEM = """
from lorasweep.data.readers import reader

@reader(".poem")
def read_poem(path, spec):
    return [{"text": line, "label": number % 2} for number, line in enumerate(path.read_text().splitlines())]
"""


@pytest.fixture
def poem(monkeypatch, tmp_path):
    points = {"lorasweep.readers": {"poem": "outside_poem:read_poem"}}
    outside.install(
        monkeypatch, tmp_path, "outside_poem", POEM, points, {"data/poem.yaml": "defaults: [schema]\nsource: poem\n"}
    )


def test_names_are_known_without_torch():
    code = (
        "import sys; from lorasweep.config import registry; print(*registry.TASKS); assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == list(registry.TASKS)


def test_reader_of_an_outside_package_is_one_function_and_one_conf_file(poem, tmp_path):
    (tmp_path / "a.poem").write_text("roses are red\nviolets are blue\n")
    spec = compose.compose_trial(["data=poem", f"data.path={tmp_path}/a.poem"]).data
    assert spec.source == "poem" and "poem" in registry.READERS
    assert readers.read_splits(spec)["train"].rows[1] == {"text": "violets are blue", "label": 1}


def test_outside_package_that_does_not_load_is_named_with_the_reason(monkeypatch, tmp_path):
    points = {"lorasweep.readers": {"odd": "outside_odd:read_odd"}}
    outside.install(monkeypatch, tmp_path, "outside_odd", "import no_such_module", points)
    with pytest.raises(ConfigError, match=r"odd comes from outside_odd 1\.0.*No module named 'no_such_module'"):
        readers.read_splits(DataSpec(source="odd", path=str(tmp_path)))


def test_entry_that_is_no_reader_is_refused(monkeypatch, tmp_path):
    points = {"lorasweep.readers": {"plain": "outside_plain:number"}}
    outside.install(monkeypatch, tmp_path, "outside_plain", "number = 3", points)
    with pytest.raises(ConfigError, match=r"'plain' is not what lorasweep\.readers takes: 3"):
        readers.read_splits(DataSpec(source="plain", path=str(tmp_path)))


def test_unknown_name_gets_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'TOKEN_CLS'"):
        compose.compose_trial(["task_type.name=TOKEN_CLX"])


@pytest.fixture
def restored(monkeypatch):
    """Leave samplers and pruners as they were."""
    for entries in (registry.SAMPLERS, registry.PRUNERS):
        assert len(entries) > 1
        monkeypatch.setattr(entries, "_entries", dict(entries._entries))


def test_a_sampler_is_one_decorated_function(restored):
    @samplers.sampler(learns=False, problems=lambda search, space: ["search.sampler: half sleeps"])
    def half(search, number, seed):
        return optuna.samplers.PartialFixedSampler({"lora.r": search.startup_trials}, samplers.random(search, 0, seed))

    search = compose.compose_trial(["search.sampler=half", "search.startup_trials=7"]).search
    study = optuna.create_study(sampler=samplers.make_sampler(search, 0))
    assert study.ask().suggest_int("lora.r", 1, 64) == 7
    assert samplers.problems(search, None) == ["search.sampler: half sleeps"]
    with pytest.raises(ConfigError, match=r"must be one of auto, grid, .*, half, got 'hlf'; did you mean 'half'"):
        compose.compose_trial(["search.sampler=hlf"])


def test_a_pruner_is_one_decorated_function(restored):
    def needs_lower(search):
        return [] if search.lower else ["search.pruner: early needs search.lower"]

    @pruners.pruner(at_rungs=True, problems=needs_lower)
    def early(search, total_steps):
        return optuna.pruners.ThresholdPruner(lower=search.lower, n_warmup_steps=total_steps // 2)

    with pytest.raises(ConfigError, match=r"early needs search\.lower"):
        compose.compose_trial(["search.pruner=early"])
    search = compose.compose_trial(["search.pruner=early", "search.lower=0.5"]).search
    assert isinstance(pruners.make_pruner(search, 64), optuna.pruners.ThresholdPruner)
    assert pruners.rungs(search, 64) == {8, 32}


def test_a_name_of_no_entry_is_an_error():
    with pytest.raises(KeyError):
        registry.SAMPLERS.get("nobody")
    assert "tpe" in registry.SAMPLERS and "nobody" not in registry.SAMPLERS
