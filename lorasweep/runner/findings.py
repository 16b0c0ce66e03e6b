"""What a pre-flight tells of a study's points, as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Findings:
    metric: str
    """The metric that ranks the trials."""
    maximize: bool
    unit: str
    bounds: tuple[float, float]
    data: list[dict[str, Any]]
    """What study.json holds of each data set, so that a change of a file is seen when the study goes on."""
    full_bytes: int = 0
    """Size of what full fine-tuning trains; 0 where no trial does."""
    adapter_bytes: int = 0
    """Of the largest adapter of the points."""
    never: Sequence[str] = ()
    """What is to be said of points that need more memory than allowed, a line each."""
    notes: Sequence[str] = ()
    """What a person may want to know of how the models are used, and of what the trials adapt of them."""
    trials_s: Sequence[float | None] = ()
    """How long the trial at each point will take, s, as far as steps were timed."""
    divided: bool = False
    """Workers share what there is, as on a CPU."""
    first_alike: Sequence[int] = ()
    """For each point the number of the first one that is the same on the model, in whatever words."""
