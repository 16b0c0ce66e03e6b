"""What a trial has for the keys that vary is read off its spec: values, names of choices, choices of groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.studies import study_of

from lorasweep.config import compose
from lorasweep.search import space
from lorasweep.study.meta import Entry
from lorasweep.study.trial import Trial


def swept(words: Sequence[str], file: Mapping[str, Any] | None = None, *extra: str, at: int = 0) -> dict[str, Any]:
    """Return what the trial at a point of a grid, with overrides of its own, has for what varies."""
    where, problems = space.read(words, file)
    assert problems == []
    return Trial(0, compose.compose_trial([*where.line(where.grid()[at]), *extra])).swept(where)


@pytest.mark.parametrize(
    "word",
    [
        "lora.r=2,4",
        "lora.r=range(2,9,3)",
        "train.learning_rate=1,2e-4",
        "lora.use_dora=false,true",
        "lora.lora_alpha=null,8",
        "lora.init_lora_weights=true,gaussian",
        "lora.target_modules=[query],[query,value]",
        "lora.rank_pattern={query:4},{value:8}",
        "lora=qv,attention",
        "train.seed=1,2",
        "data.path='a,b.csv','${x}.csv'",
    ],
)
def test_point_of_a_grid_is_found_again_in_the_spec(word):
    where, problems = space.read([word, "train.epochs=1"])
    assert problems == []
    for point in where.grid():
        found = Trial(0, compose.compose_trial(where.line(point))).swept(where)
        assert (found, [type(v) for v in found.values()]) == (point, [type(v) for v in point.values()])


def test_named_choice_goes_by_its_name():
    named = {"lora.target_modules": {"choices": {"few": ["query"], "more": ["query", "value"]}}}
    assert [swept([], named, at=i) for i in (0, 1)] == [{"lora.target_modules": "few"}, {"lora.target_modules": "more"}]


def test_key_whose_condition_does_not_hold_does_not_vary():
    conditional = {"lora.r": "2,8", "lora.lora_dropout": {"choices": [0.1], "when": "lora.r > 4"}}
    assert [swept([], conditional, at=i) for i in (0, 1)] == [{"lora.r": 2}, {"lora.r": 8, "lora.lora_dropout": 0.1}]


def test_what_a_trial_alone_sets_is_its_own():
    assert swept(["lora.r=2,4", "train.epochs=1"], None, "train.epochs=3", "lora.lora_alpha=32") == {
        "lora.r": 2,
        "train.epochs": 3.0,
        "lora.lora_alpha": 32.0,
    }


def test_key_that_a_trial_leaves_open_has_its_configured_value():
    where, _ = space.read(["lora.r=2,4", "lora=qv,attention"])
    assert Trial(0, compose.compose_trial(["train.epochs=1"])).swept(where)["lora.r"] == 8
    assert Trial(0, compose.compose_trial(["train.epochs=1"])).swept(where)["lora"] is None


def test_waiting_trial_that_was_looked_at_is_not_composed_again(tmp_path, monkeypatch):
    study = study_of(tmp_path, [2, 4])
    looked_at = study.spec(study.trial(0).user_attrs["overrides"])
    monkeypatch.setattr(compose, "compose_trial", None)
    assert study.claim() == 0
    assert study.drawn(0).spec == looked_at


def test_trial_begins_with_the_weights_of_the_one_that_is_named(tmp_path):
    study = study_of(tmp_path, [2])
    number = study.queue.enqueue([Entry(study.space.line({"lora.r": 4}), {"lora.r": 4}, start_from=0, added=True)])[0]
    assert study.claim() == number
    assert (study.drawn(number).start_from, study.drawn(number).spec.lora.r) == (0, 4)
