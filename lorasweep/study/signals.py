"""What the workers of a study say to each other: signs of life, requests to stop, and what was done once for all.

Kept as user attributes of the Optuna study, which any worker may read and write.
"""

import time
from collections.abc import Mapping
from typing import Any

import optuna

from lorasweep.hardware import container
from lorasweep.study import repeats, storage
from lorasweep.study.lease import Owner


class Signals:
    """The attributes of a study, as one worker reads and writes them."""

    def __init__(self, study: optuna.Study, store: storage.Store, owner: Owner) -> None:
        self._study = study
        self._store = store
        self._owner = owner
        self._beats = 0

    def all(self) -> dict[str, Any]:
        """Return every user attribute of the study."""
        return self._store.optuna.get_study_user_attrs(self._study._study_id)

    @storage.patient
    def beat(
        self, progress: Mapping[int, Mapping[str, float]], busy_s: float, idle_s: float, began: float | None = None
    ) -> None:
        """Give a sign of life, with how far each trial of ours is, the seconds with and without one so far, and when
        the first one began.
        """
        self._beats += 1
        shown = {str(n): dict(p) for n, p in progress.items()}
        spent = {"busy_s": round(busy_s, 3), "idle_s": round(idle_s, 3)}
        sign = {"beat": self._beats, "trials": shown, "host": self._owner.host, **spent}
        sign |= {"began": began, "at": time.time()}
        sign["oom_kills"] = container.oom_kills()
        self._study.set_user_attr(f"worker:{self._owner.name}", sign)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the last sign of life of every worker, by name."""
        return {k.removeprefix("worker:"): v for k, v in self.all().items() if k.startswith("worker:")}

    def begin(self) -> None:
        """Start the wall clock and forget an earlier `stop --all`."""
        if "began" not in self.all():
            self._study.set_user_attr("began", time.time())
        self._study.set_user_attr("stop:all", None)

    def warmed(self) -> bool:
        """Return whether search.warm_start has been done."""
        return bool(self.all().get("warmed"))

    def set_warmed(self) -> None:
        self._study.set_user_attr("warmed", True)

    def stop(self, number: int | None, reason: str) -> None:
        """Ask the workers to end one trial as PRUNED, or all of them to stop as after Ctrl-C."""
        self._study.set_user_attr("stop:all" if number is None else f"stop:{number}", reason)

    @storage.patient
    def stops(self) -> dict[str, str]:
        """Return what was asked to stop, `all` or a trial's number, with the reason."""
        found = self.all().items()
        return {k.removeprefix("stop:"): v for k, v in found if k.startswith("stop:") and v}

    def racing(self) -> repeats.Race:
        """Return which trials run again with other seeds."""
        return repeats.Race.from_dict(self.all().get("race"))

    def set_racing(self, race: repeats.Race) -> None:
        self._study.set_user_attr("race", race.to_dict())
