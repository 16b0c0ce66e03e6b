"""What a study has used of a device, and what pruning, shared passes and kept prefixes have spared it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasweep.report.study_data import StudyData
from lorasweep.study.result import TrialResult

ENDED = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """None is not known."""

    device_s: float
    """Training and evaluation of ended trials."""
    elapsed_s: float
    side_by_side: float | None
    """Trials at a time on average while it ran; above 1 they shared passes or ran in several workers."""
    steps: int
    steps_spared: int | None
    """Steps that pruned trials did not take."""
    pruning_s: float | None
    """What those steps would have taken, at the pace of the pruned trial itself."""
    packing_s: float | None
    prefix_s: float | None

    @property
    def spared(self) -> float | None:
        """The share of all planned steps that pruning spared."""
        total = self.steps + (self.steps_spared or 0)
        return None if self.steps_spared is None or not total else self.steps_spared / total

    def share(self, seconds: float | None) -> float | None:
        """Return which part of what it would have taken otherwise these spared seconds are."""
        total = self.device_s + (seconds or 0.0)
        return None if seconds is None or not total else seconds / total


def cost(data: StudyData) -> Cost:
    """Return what the ended trials of a study cost."""
    ended = [t for t in data.trials if t.state in ENDED]
    spans = [(t.began_s, t.ended_s) for t in ended if t.began_s and t.ended_s and t.result.device_s]
    elapsed, walls = _covered(spans), sum(b - a for a, b in spans)
    full = {t.result.steps for t in ended if t.state == "COMPLETE" and t.result.steps}
    pruned = [t.result for t in ended if t.state == "PRUNED" and t.result.steps]
    left = {r.number: max(0, next(iter(full)) - (r.steps or 0)) for r in pruned} if len(full) == 1 else None
    return Cost(
        device_s=sum(t.result.device_s or 0.0 for t in ended),
        elapsed_s=elapsed,
        side_by_side=walls / elapsed if elapsed else None,
        steps=sum(t.result.steps or 0 for t in ended),
        steps_spared=None if left is None else sum(left.values()),
        pruning_s=None if left is None else sum(_pace(r) * left[r.number] for r in pruned),
        packing_s=_sum(t.result.packing_saved_s for t in ended),
        prefix_s=_sum(t.result.prefix_saved_s for t in ended),
    )


def _pace(result: TrialResult) -> float:
    """Return a trial's seconds a step."""
    return (result.device_s or 0.0) / result.steps if result.steps else 0.0


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum of what is known, None where nothing is."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds in which at least one trial ran."""
    total, until = 0.0, -math.inf
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
