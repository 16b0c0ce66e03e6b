"""A claimed trial: its number, and the spec that all else is read off."""

from dataclasses import dataclass

from lorasweep.config.spec import TrialSpec
from lorasweep.search.dimension import Value
from lorasweep.search.space import Space


@dataclass(frozen=True)
class Trial:
    """A trial that is ours to run."""

    number: int
    spec: TrialSpec
    """What it trains, with the override strings that it was made from."""
    start_from: int | None = None
    """The trial whose weights it takes over."""
    killed: int = 0
    """How often its workers have died."""
    is_suspect: bool = False
    """The last of them died without getting further than the one before: it runs alone, so that it alone is to blame
    the next time."""

    baseline: str = ""
    """Which baseline it is, if any."""

    def swept(self, space: Space) -> dict[str, Value]:
        """Return what it has for the keys that vary, and for those that it alone sets, by key."""
        return {"baseline": self.baseline} if self.baseline else space.point(self.spec)
