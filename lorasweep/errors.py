"""The error family. A ConfigError is the user's to mend and lists every problem at once; the rest say what happened."""

from collections.abc import Sequence
from difflib import get_close_matches


class LorasweepError(Exception):
    """Anything lorasweep raises on purpose."""


class ConfigError(LorasweepError):
    """One or more problems in what the user asked for, each as `key: rule, value, next move`."""

    def __init__(self, problems: Sequence[str], where: str = "the configuration") -> None:
        self.problems = list(dict.fromkeys(problems))
        self.where = where
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{count} in {where}", *self.problems]))

    def __reduce__(self) -> tuple:
        return ConfigError, (self.problems, self.where)


class LostLease(LorasweepError):
    """Another worker has the trial: this one was thought dead."""


class KnownPoint(LorasweepError):
    """What a trial would compute is another trial's already: it is not trained again."""


class DiskFull(LorasweepError):
    """The study's folder takes no more; nothing is lost, the trials go on from their checkpoints."""


class WorkerGone(LorasweepError):
    """A process of this command ended before it had done what it was given."""


class StorageDown(LorasweepError):
    """The study's database is gone; its trials go on from their checkpoints once it is back."""


class StudyMismatch(LorasweepError):
    """What was asked of a study differs from what it holds."""


class Unstable(LorasweepError):
    """The loss became NaN or infinite."""


class Unpackable(LorasweepError):
    """A layer cannot compute for several trials at once; they have to run one after another."""


class MlflowDown(LorasweepError):
    """MLflow did not answer, or failed itself: worth another try later."""


class MlflowRefused(LorasweepError):
    """MLflow answered that it does not take this: another try would fail the same way."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of `known`, or its full list when nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
