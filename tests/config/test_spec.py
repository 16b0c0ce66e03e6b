"""Every setting says what it affects, and what is derived from that."""

from dataclasses import dataclass, fields, replace

import pytest

from lorasweep.config import keys, spec
from lorasweep.config.compose import compose_trial
from lorasweep.config.fields import Affects, affects, ranged, section
from lorasweep.errors import ConfigError
from lorasweep.memory import estimate
from lorasweep.tasks import token_cache
from lorasweep.training import checkpoint, workload


def with_value(trial: spec.TrialSpec, key: str, value: object) -> spec.TrialSpec:
    name, _, setting = key.partition(".")
    return replace(trial, **{name: replace(getattr(trial, name), **{setting: value})})


@pytest.mark.parametrize("section_name", spec.SECTIONS)
def test_every_setting_says_what_it_affects(section_name):
    silent = [f.name for f in fields(spec.SECTIONS[section_name]) if "affects" not in f.metadata]
    assert silent == []


def test_a_setting_that_does_not_say_what_it_affects_is_refused():
    with pytest.raises(TypeError, match="affects"):
        ranged(8, 1, 1024)

    @dataclass(frozen=True, kw_only=True)
    class Section:
        silent: int = 3

    with pytest.raises(KeyError, match="affects"):
        affects(fields(Section)[0])


def test_what_changes_the_base_or_tokens_changes_results_and_memory():
    for what in (Affects.BASE, Affects.TOKENS):
        affecting = set(spec.keys_affecting(what))
        assert affecting <= set(spec.keys_affecting(Affects.RESULT))
        assert affecting <= set(spec.keys_affecting(Affects.MEMORY))


def test_only_what_a_study_asks_is_settled_and_it_affects_no_trial():
    settled = set(spec.keys_affecting(Affects.STUDY))
    trials = Affects.BASE | Affects.TOKENS | Affects.MEMORY | Affects.RESULT
    assert settled and all(key.startswith("search.") for key in settled)
    assert not settled & set(spec.keys_affecting(trials))


OTHER_VALUES = {
    "model.pooling": "mean",
    "data.max_tokens": 77,
    "train.precision": "bf16",
    "lora.r": 3,
    "lora.lora_alpha": 5.0,
    "train.learning_rate": 0.5,
    "train.slots": 2,
    "train.prefix_cache_gib": 7.0,
    "tracking.reload_check": False,
    "tracking.log_every": 9,
    "search.sampler": "tpe",
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_key_changes_just_what_it_says(key):
    trial = compose_trial([])
    other = with_value(trial, key, OTHER_VALUES[key])
    seen = {
        Affects.BASE: workload.key(trial) != workload.key(other),
        Affects.MEMORY: estimate._key(trial, 1, None) != estimate._key(other, 1, None),
        Affects.RESULT: checkpoint.identity(0, trial, 9) != checkpoint.identity(0, other, 9),
    }
    assert {what for what, differs in seen.items() if differs} == {w for w in seen if key in spec.keys_affecting(w)}
    assert workload.varies([key]) == seen[Affects.BASE]


def test_a_group_varies_the_base_where_one_of_its_keys_does():
    assert [g for g in spec.SECTIONS if workload.varies([g])] == ["model", "task_type", "data", "train"]


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        """Save nothing: all tokenizers of this test are equal."""


def test_tokens_are_shared_where_data_and_task_agree(tmp_path):
    class Task:
        name = "SEQ_CLS"

    def place(*overrides: str) -> str:
        return token_cache.place(compose_trial(list(overrides)), Task(), Tokenizer(), "rows").name

    assert place() == place("lora.r=3", "train.seed=2", "tracking.log_every=9")
    assert place() != place("data.max_tokens=77")
    assert place() != place("task_type.generate=true")


def test_a_value_is_found_by_its_path():
    trial = compose_trial(["lora.r=3", "train.learning_rate=0.5", "study=mine"])
    assert (trial.get("lora.r"), trial.get("train.learning_rate"), trial.get("study")) == (3, 0.5, "mine")


def test_flattened_settings_have_every_key_of_a_trial_and_mappings_whole():
    trial = compose_trial(["lora.rank_pattern={query: 2}"])
    flat = spec.flattened(trial.to_dict())
    assert set(flat) == {key for key in spec.known_keys() if not key.startswith("search.")}
    assert flat["lora.rank_pattern"] == {"query": 2}
    assert all(trial.get(key) == value for key, value in flat.items())


def test_one_of_takes_numbers_and_names_them_all():
    problems: list[str] = []
    section(spec.LoraSpec, {"loftq_bits": 5}, "lora", spec.known_keys(), problems)
    assert problems == ["lora.loftq_bits: must be one of 4, 8, got '5'"]


def test_objectives_are_costs_and_a_mistyped_one_has_a_suggestion():
    tree = {"search": {"objectives": ["trainable", "peak_gb"]}}
    _, problems = spec.trial_spec(tree, ())
    words = "search.objectives: each must be one of trainable, adapter_mb, train_s, peak_gib, got 'peak_gb'"
    assert problems == [f"{words}; did you mean 'peak_gib'?"]
    (takes,) = [key.allowed for key in keys.described_keys() if key.path == "search.objectives"]
    assert takes == "a list, each one of trainable, adapter_mb, train_s, peak_gib or null"


def test_a_checkpoint_with_a_default_of_an_earlier_version_goes_on(tmp_path):
    wanted = checkpoint.identity(0, compose_trial([]), 9)
    older = {k: v for k, v in wanted.items() if k != "data.encoding"} | {"data.delimiter": ","}
    checkpoint.write(tmp_path / "checkpoint.pt", {"identity": older})
    assert checkpoint.read(tmp_path / "checkpoint.pt", wanted) is not None
    for key, value in {"data.delimiter": ";", "lora.r": 5}.items():
        checkpoint.write(tmp_path / "checkpoint.pt", {"identity": older | {key: value}})
        with pytest.raises(ConfigError, match=key):
            checkpoint.read(tmp_path / "checkpoint.pt", wanted)
