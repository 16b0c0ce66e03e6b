"""Whatever trials meet in the slots, each ends as it would alone: hypothesis draws who meets whom."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.parity import EXACT, OPTIONS, TASKS, check, models

pytestmark = pytest.mark.usefixtures("always_together")

BERTS = ("query", "key", "dense", "value")
"""Modules that a Llama does not have."""

EXAMPLES = 2
"""Mixes a task, the same at every run."""

MORE = 25
"""Mixes a task where there is time, other ones at every run."""

Mix = tuple[int, list[tuple[str, ...]]]
"""Slots, and each trial's settings."""


def options(task: str) -> list[str]:
    """Return the names of the options that the task's tiny model can have."""
    if task == "seq_2_seq_lm":  # the decoder's new layers are saved, and peft saves none with adapted parameters inside
        return [n for n in OPTIONS if n != "parameters"]
    return [n for n, own in OPTIONS.items() if task != "causal_lm" or not any(b in o for o in own for b in BERTS)]


@st.composite
def trials(draw: st.DrawFn, task: str) -> tuple[str, ...]:
    """Draw a trial: an option with another rank, batch, accumulation, length and seed than its own."""
    name = draw(st.sampled_from(options(task)))
    rank = draw(st.sampled_from([1, 2, 3, 4, 7, 12]))
    batch = draw(st.integers(2, 9))
    # In-batch negatives are of the whole batch: it cannot be split.
    micro = batch if task == "feature_extraction" else draw(st.integers(1, batch))
    return (
        *OPTIONS[name],
        f"lora.r={rank + rank % 2 if name == 'orthogonal' else rank}",
        f"train.batch_size={batch}",
        f"train.micro_batch_size={micro}",
        f"train.max_steps={draw(st.integers(1, 5))}",
        f"train.eval_every={draw(st.integers(1, 4))}",
        f"train.seed={draw(st.integers(0, 3))}",
    )


@st.composite
def mixes(draw: st.DrawFn, task: str) -> Mix:
    """Draw more trials than slots, mostly, so that some begin while others are in the middle."""
    return draw(st.integers(2, 4)), draw(st.lists(trials(task), min_size=3, max_size=4))


def drawn(examples: int, **more: Any) -> settings:
    # what the fixtures patch is the same for every mix
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, database=None, deadline=None, suppress_health_check=health, **more)


def ends_as_alone(task: str, bert: Path, language_model: Path, draws: st.DataObject) -> None:
    folder, more = models(task, bert, language_model)
    slots, members = draws.draw(mixes(task))
    check(task, folder, members, slots, EXACT, *more)


@pytest.mark.parametrize("task", TASKS)
@drawn(EXAMPLES, derandomize=True)
@given(draws=st.data())
def test_any_mix_of_trials_in_any_number_of_slots(tiny_bert, tiny_llama, double, task, draws):
    ends_as_alone(task, tiny_bert, tiny_llama, draws)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@drawn(MORE, phases=[Phase.explicit, Phase.generate])
@given(draws=st.data())
def test_many_other_mixes(tiny_bert, tiny_llama, double, task, draws):
    ends_as_alone(task, tiny_bert, tiny_llama, draws)
