"""The commands that give a study more to do, or run what is left of it: add, resume, work, extend.

They say at once what they are going on with, and only then load what trains.
"""

from dataclasses import replace
from functools import partial

from lorasweep import console
from lorasweep.cli.find import find, refuse_more
from lorasweep.cli.parser import Options
from lorasweep.config import trust
from lorasweep.errors import ConfigError, KnownPoint
from lorasweep.runner import hydra_sweeper
from lorasweep.runner.request import Request
from lorasweep.study.study import Study


def _found(options: Options) -> tuple[Study, Request]:
    study, request = find(options.study, options.words, trusted=options.trust_remote_code)
    print(f"going on with {console.shown(study.folder)}", flush=True)
    return study, request


def resume(options: Options) -> int:
    """Go on with a study after Ctrl-C, a crash or a reboot."""
    study, request = _found(options)
    from lorasweep.runner import launch
    from lorasweep.runner import resume as going_on
    from lorasweep.runner.worker_process import Workers

    if not request.launcher and not study.trusted:
        trust.refuse_commands(study.meta.launcher, study.folder)
    going_on.resume(study, request.overrides, failed=options.failed, changed_data=options.changed_data)
    meta = replace(study.meta, launcher=request.launcher or study.meta.launcher)
    with Workers() as workers:
        return hydra_sweeper.launched(
            lambda way: launch.carry_on(study, way, workers.begin), meta, study.folder, workers
        )


def extend(options: Options) -> int:
    """Copy a study's trials into a new one with another space, and run what that leaves open."""
    old, request = _found(options)
    from lorasweep.runner import launch
    from lorasweep.runner import resume as going_on
    from lorasweep.runner.worker_process import Workers

    with Workers() as workers:
        planned = going_on.extend(old, request, workers.look)
        made = partial(going_on.take_over, old, planned)
        return hydra_sweeper.launched(
            lambda way: launch.run_made(made(), planned, way, workers.begin), planned.meta, planned.folder, workers
        )


def work(options: Options) -> int:
    """Run trials of a study in this process until none is left."""
    study, request = _found(options)
    refuse_more(request, "work takes a study alone")
    from lorasweep.runner import resume as going_on

    return going_on.work(study)


def add(options: Options) -> int:
    """Put one more trial at the head of the queue: of overrides, or a changed copy of another trial."""
    study, request = find(options.study, options.words, trusted=options.trust_remote_code)
    if options.from_weights and options.like is None:
        raise ConfigError(["--from-weights: needs --like NUMBER, the trial whose weights are taken over"])
    if request.launcher:
        raise ConfigError([f"{word}: belongs to the study, not to a trial" for word in request.launcher])
    if not request.overrides and options.like is None:
        raise ConfigError(["add: give overrides, e.g. lora.r=32, or --like NUMBER"], "the command line")
    from lorasweep.runner.by_hand import by_hand

    try:
        entry = by_hand(study, request.overrides, options.like, options.from_weights)
    except KnownPoint as known:
        print(known)
        return 0
    number = study.queue.enqueue([replace(entry, may_be_pruned=options.may_be_pruned)])[0]
    print(f"trial {number} waits at the head of the queue of {study.meta.name}")
    if not study.owners.alive():
        print(f"no worker runs; start one with: python -m lorasweep resume {console.shown(study.folder)}")
    return 0
