"""From override strings to a study that runs: validate every point, fill the queue, launch workers, show the outcome.

hydra_plugins hands LorasweepSweeper to Hydra, for the sake of its launchers: each worker is one job of one launch.
"""

import functools
import shlex
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lorasweep.errors import ConfigError, DiskFull, WorkerGone
from lorasweep.runner import plan, torch_calls
from lorasweep.runner.interrupt import EXIT_INTERRUPTED
from lorasweep.runner.launchers import Launch
from lorasweep.runner.plan import Plan
from lorasweep.runner.torch_calls import Begin
from lorasweep.search.order import ENDED
from lorasweep.study.result import result_of
from lorasweep.study.study import Study

EXIT_OK, EXIT_FAILED_TRIALS = 0, 3
MOST_REASONS = 3
"""Most reasons to print where no trial was completed."""
LAUNCHES_WITHOUT_PROGRESS = 3
POLL_S = 1.0


# --- running it ------------------------------------------------------------------------------------------------------


def make(planned: Plan) -> Study:
    """Make a planned study; another command may have taken a name that the clock gave both."""
    return Study.create(planned.folder, planned.meta, planned.queue, rename=planned.first.study is None)


def run_study(planned: Plan, launch: Launch, begin: Begin = torch_calls.here) -> int:
    """Make the study, run it, show the outcome; return the exit code. `begin` is asked for what needs torch."""
    return run_made(make(planned), planned, launch, begin)


def run_made(study: Study, planned: Plan, launch: Launch, begin: Begin = torch_calls.here) -> int:
    """Run a study that has just been made; return the exit code."""
    from lorasweep.tracking import runs

    adopted = begin(torch_calls.adopt, str(study.folder))

    never = planned.never if planned.meta.search["sampler"] == "grid" else ()  # else no trial is at those points
    for line in (*planned.said, *planned.notes, *planned.point_notes, *never):
        print(line, flush=True)
    from lorasweep.runner import forecast

    expected = forecast.said(planned.meta.expected_s, study.search)
    if expected:
        print(f"expected: {expected}", flush=True)
    command = shlex.join(["python", "-m", "lorasweep", "-m", *planned.meta.overrides])
    note = f"{planned.meta.question}\n\n`{command}`".strip()
    wait = torch_calls.has_torch()  # two threads that import a lot are in each other's way
    study.set_parent(runs.open_study(planned.first, study.meta.name, note, wait=wait))
    adopted()
    return carry_on(study, launch, begin)


def _warm_start(study: Study) -> None:
    """Let the sampler see the finished trials of earlier studies, once."""
    if study.signals.warmed():
        return
    for other in plan.teachers(study.search, study.meta.metric, study.meta.maximize):
        taken = study.queue.take_in(
            [t for t in other.trials() if t.state in ENDED and t.values], origin=str(other.folder)
        )
        print(f"warm start: {len(taken)} of {len(other.trials())} trials of {other.meta.name} lie in this space")
    study.signals.set_warmed()


def carry_on(study: Study, launch: Launch, begin: Begin = torch_calls.here) -> int:
    """Run what is left of a study and show the outcome; return the exit code."""
    from lorasweep import console
    from lorasweep.runner import interrupt
    from lorasweep.study import repeat_rounds

    total = len(study.trials())
    print(
        f"study {study.meta.name}: {total} trial{'s' if total != 1 else ''}, {console.shown(study.folder)}", flush=True
    )
    _warm_start(study)
    study.begin()
    with interrupt.heard(lambda: study.signals.stop(None, "Ctrl-C")) as interrupts:
        _run_workers(study, launch, interrupts)
        while not _stopped(study, interrupts) and (again := repeat_rounds.next_round(study)):
            count = f"{len(again)} trials run" if len(again) > 1 else "1 trial runs"
            print(f"repeats: {count} again with another seed", flush=True)
            _run_workers(study, launch, interrupts)
    if _stopped(study, interrupts):
        print(
            f"stopped, nothing is lost; go on with: python -m lorasweep resume {console.shown(study.folder)}",
            flush=True,
        )
        return EXIT_INTERRUPTED
    return finish(study, begin)


def _stopped(study: Study, interrupts: Any) -> bool:
    return bool(interrupts.count) or "all" in study.signals.stops()


def _run_workers(study: Study, launch: Launch, interrupts: Any) -> None:
    """Launch workers until nothing is left: a launcher whose process was killed may take the other workers with it."""
    from lorasweep.hardware import container
    from lorasweep.runner import parent, reclaim
    from lorasweep.study import lease
    from lorasweep.tracking import runs

    idle = 0
    divide = not container.threads_are_given()
    work = functools.partial(parent.work, str(study.folder), divide, study.trusted, lease.me())
    while not _stopped(study, interrupts):
        reclaim.settle(study)
        if not study.ready():
            if not study.queue.running():
                return
            time.sleep(POLL_S)  # somebody else's workers are still at it
            continue
        before = _state(study)
        failure: Exception | None = None
        try:
            launch(work, max(1, study.search.workers - study.owners.alive()))
        except ConfigError:
            raise
        except Exception as error:  # a launcher's own error, or a worker's: what it had goes back
            failure = error
            told = runs.redact(str(error))
            print(f"a worker ended: {type(error).__name__}: {told.splitlines()[0] if told else ''}")
        if isinstance(failure, DiskFull) and _waited_for_room(study, interrupts):
            idle = 0
            continue
        idle = idle + 1 if _state(study) == before else 0
        if idle >= LAUNCHES_WITHOUT_PROGRESS or reclaim.is_fatal(failure):
            raise failure or RuntimeError(f"workers end without running a trial; see {study.folder}")


def _waited_for_room(study: Study, interrupts: Any) -> bool:
    from lorasweep.runner import room

    return room.wait(study, lambda: _stopped(study, interrupts))


def _state(study: Study) -> list[tuple]:
    keys = ("checkpoint_step", "deaths")
    return [(t.number, t.state, *map(t.user_attrs.get, keys)) for t in study.trials()]


def finish(study: Study, begin: Begin = torch_calls.here) -> int:
    """Score the winner on the test split, close the study in MLflow, print the table; return the exit code.

    What needs torch is asked of `begin`, and what does not goes on meanwhile.
    """
    where = str(study.folder), study.trusted
    best = study.best()
    known = result_of(best, study.trial_folder(best.number)).test if best is not None else {}
    tested = begin(torch_calls.score, *where) if known is None else None
    from lorasweep.report import html_page, tables, terminal
    from lorasweep.runner import cleanup
    from lorasweep.study import answer, wording
    from lorasweep.tracking import runs

    spec = study.first_spec()
    failed = study.failed()
    test = known or (tested and _answered(tested, "the test split was not read")) or {}
    logged = begin(torch_calls.log_winner, *where) if spec.tracking.enabled and best is not None else str
    found = answer.answer(study)
    scores = {f"test_{k}": v for k, v in test.items()}
    if found.best is not None:
        scores |= {f"best_eval_{study.meta.metric}": found.best.value, "best_trial": found.best.number}
    if found.best is not None and found.best.standard_error is not None:
        scores[f"best_eval_{study.meta.metric}_standard_error"] = found.best.standard_error
    answer.write_best(study, found, wording.text(found))
    html_page.write_if_possible(study, found)
    runs.close_study(
        spec,
        study.meta.mlflow_parent,
        scores,
        ok=not failed and study.best() is not None,
        folder=study.folder,
        answer=tables.plain(wording.text(found)),
    )
    if study.meta.mlflow_parent is None:
        study.set_parent(runs.run_of(study.folder))
    terminal.show(study, study.meta.outputs, found, spec.tracking)
    told = _answered(logged, "the model was not logged")
    if told:
        print(told)
    cleanup.tidy(study, spec.tracking)
    if study.best() is None:
        print(f"no trial was completed: {_reasons(study)}")
        return EXIT_FAILED_TRIALS
    return EXIT_FAILED_TRIALS if failed else EXIT_OK


def _answered(call: Callable[[], Any], what_else: str) -> Any:
    """Return what a call returns; None, with the reason printed, where its process was killed: a study is over without.

    `resume` tries again.
    """
    try:
        return call()
    except WorkerGone as error:
        print(f"{what_else}: {error}; `resume` tries again", flush=True)
        return None


def _reasons(study: Study) -> str:
    """Return why the trials of a study without a complete one ended, each reason once."""
    states = Counter(
        f"{trial.state.name} ({trial.user_attrs.get('reason') or 'no reason was left'})" for trial in study.trials()
    )
    return "; ".join(f"{count} {text}" for text, count in states.most_common(MOST_REASONS)) or "none was begun"
