"""The commands that run what is left of a study: resume, work, extend."""

from dataclasses import replace
from functools import partial

from lorasweep.cli.find import find, refuse_more
from lorasweep.cli.parser import Options
from lorasweep.runner import hydra_sweeper
from lorasweep.runner import resume as going_on
from lorasweep.runner.launch import carry_on, run_made


def resume(options: Options) -> int:
    """Go on with a study after Ctrl-C, a crash or a reboot."""
    study, request = find(options.study, options.words)
    going_on.resume(study, request.overrides, failed=options.failed)
    meta = replace(study.meta, launcher=list(request.launcher) or study.meta.launcher)
    return hydra_sweeper.launched(lambda launch: carry_on(study, launch, {}), meta, study.folder, False)


def extend(options: Options) -> int:
    """Copy a study's trials into a new one with another space, and run what that leaves open."""
    old, request = find(options.study, options.words)
    planned = going_on.extend(old, request)
    made = partial(going_on.take_over, old, planned)
    return hydra_sweeper.launched(lambda launch: run_made(made(), planned, launch), planned.meta, planned.folder, False)


def work(options: Options) -> int:
    """Run trials of a study in this process until none is left."""
    study, request = find(options.study, options.words)
    refuse_more(request, "work takes a study alone")
    return going_on.work(study)
