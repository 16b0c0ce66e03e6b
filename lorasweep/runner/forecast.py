"""How long a study will take on this machine, and what it costs: from what its trials will take (trial_pace.py).

What pruning ends early and repeats add is not known before.
"""

from collections.abc import Sequence

from lorasweep.config.spec import SearchSpec
from lorasweep.study.meta import Entry


def seconds(
    each_s: Sequence[float | None], entries: Sequence[Entry], search: SearchSpec, divided: bool
) -> float | None:
    """Return how long the trials of a study will take; None where nothing was timed.

    `each_s` are the seconds of the points of a grid, or of those at the ends of a sampled space, and after them of the
    baselines. `divided` tells that workers share what there is, as on a CPU.
    """
    beside = sum(bool(entry.baseline) for entry in entries)
    known = [s for s in each_s if s is not None]
    if len(known) < len(each_s) or not each_s:
        return None
    searched, compared = known[: len(known) - beside], known[len(known) - beside :]
    mean = sum(searched) / len(searched) if searched else 0.0
    total = mean * (len(entries) - beside) + sum(compared)
    return total if divided else total / min(search.workers, len(entries))


def said(expected_s: float | None, search: SearchSpec) -> str:
    """Return the forecast in words; "" where there is none."""
    if expected_s is None:
        return ""
    line = f"about {duration(expected_s)} on this machine"
    if search.cost_per_hour is not None:
        line += f", {money(expected_s, search)} at search.cost_per_hour={search.cost_per_hour:g}"
    apart = [
        "less where trials are pruned" if search.pruner != "none" else "",
        "repeats come on top" if search.repeats else "",
    ]
    return "; ".join(filter(None, [line, *apart]))


def money(total_s: float, search: SearchSpec) -> str:
    """Return what a worker costs in this time."""
    return f"{total_s / 3600 * (search.cost_per_hour or 0.0):.2f}"


def duration(total_s: float) -> str:
    """Return seconds as one would say them."""
    if total_s < 90:
        return f"{max(1, round(total_s))} s"
    return f"{total_s / 60:.0f} min" if total_s < 5400 else f"{total_s / 3600:.1f} h"
