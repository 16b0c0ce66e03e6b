"""Trials that the best one is compared with, though nobody would search among them: search.baselines.

A baseline is a trial with the user attribute `baseline`. Samplers and pruners do not see it, and it is never the best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import TrialSpec
from lorasweep.study import comparison, significance
from lorasweep.study.candidate import Candidate
from lorasweep.study.comparison import Rivals
from lorasweep.study.direction import upward
from lorasweep.study.result import result_of
from lorasweep.study.significance import Interval
from lorasweep.tasks.metric import Parts

if TYPE_CHECKING:
    from lorasweep.study.study import Study

NAMES = {"base": "the base as it is", "head": "a head alone", "full": "full fine-tuning"}
"""In words, by the name in search.baselines."""

RATES = {"head": 10.0, "full": 0.1}
"""What train.learning_rate is multiplied by. A head alone is a convex problem and takes larger steps; full fine-tuning
is best at about a tenth of LoRA's rate: J. Schulman, LoRA Without Regret, Thinking Machines Lab 2025."""

SETTINGS = {
    "base": ["train.max_steps=0"],
    "head": ["lora.target_modules=[]"],
    "full": ["lora.target_modules=[]", "lora.full=true"],
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A complete baseline beside the best trial."""

    name: str
    number: int
    value: float
    """Its primary metric."""
    interval: Interval | None
    """95 %, of how much better the best one is, over the same eval examples; None: nothing tells."""
    trainable: int | None


def overrides(name: str, fixed: Sequence[str], spec: TrialSpec) -> list[str]:
    """Return the override strings of a baseline; `fixed` are those that all trials share, `spec` what they come to.

    What they say of the adapter is left out.
    """
    line = [o for o in fixed if key_of(o) != "lora" and not key_of(o).startswith("lora.")]
    rate, times = spec.train.learning_rate, RATES.get(name)
    if times is not None and isinstance(rate, str):
        line = [
            *(o for o in line if key_of(o) != "train.lr_multiple"),
            f"train.lr_multiple={spec.train.lr_multiple * times:g}",
        ]
    elif times is not None and not isinstance(rate, str):
        line = [
            *(o for o in line if key_of(o) != "train.learning_rate"),
            f"train.learning_rate={min(1.0, rate * times):g}",
        ]
    return [*line, *SETTINGS[name]]


def compared(
    study: "Study", trials: Sequence[FrozenTrial], scores: Callable[[int], Parts | None], best: Candidate
) -> list[Baseline]:
    """Return the complete baselines in the order in which they were asked for, each against the best."""
    done = [t for t in trials if "baseline" in t.user_attrs and t.state == TrialState.COMPLETE and t.values]
    return [
        Baseline(
            name=t.user_attrs["baseline"],
            number=t.number,
            value=t.values[0],
            interval=_interval(study, scores, best, t),
            trainable=result_of(t, study.trial_folder(t.number)).trainable,
        )
        for t in done
    ]


def _interval(
    study: "Study", scores: Callable[[int], Parts | None], best: Candidate, other: FrozenTrial
) -> Interval | None:
    ours = [parts for n in best.scored if (parts := scores(n)) is not None]
    theirs = scores(other.number)
    same = ours and theirs is not None and all(np.array_equal(parts.rows, theirs.rows) for parts in ours)
    if not same or theirs is None:
        return None
    replicates_KR = np.stack([significance.mean_replicates(ours), significance.replicates(theirs)])
    values_K = np.array([best.value, other.values[0]])
    rivals = Rivals(upward(values_K, study.meta.maximize), upward(replicates_KR, study.meta.maximize))
    _, low, high = comparison.difference_interval(rivals, 0, 1)
    return Interval(low, high)
