"""What is looked at between launches of workers: what dead ones had, and whether launching again helps."""

from lorasweep.errors import ConfigError, DiskFull, StorageDown
from lorasweep.study.result import result_of, write_result
from lorasweep.study.study import Study


def settle(study: Study) -> None:
    """Put back what dead workers had; leave a result for a trial whose workers died too often."""
    for number in study.owners.reclaim(study.search.max_retries):
        trial, folder = study.trial(number), study.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder, result_of(trial, folder))


def is_fatal(error: Exception | None) -> bool:
    """Return whether launching again would end the same way."""
    return isinstance(error, DiskFull | ConfigError | StorageDown)
