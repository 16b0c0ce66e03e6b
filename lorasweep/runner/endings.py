"""How a trial ends: its result written, its MLflow run ended, the study updated, the screen shown."""

from collections.abc import Callable

from lorasweep.console import Display
from lorasweep.errors import LostLease
from lorasweep.files import CHECKPOINT
from lorasweep.runner.trial_run import Running
from lorasweep.study.result import TrialResult, write_result
from lorasweep.study.study import Study


class Endings:
    """Ends a worker's trials."""

    def __init__(self, study: Study, display: Display, forget: Callable[[Running], None]) -> None:
        """`forget` lets the worker take a trial that has ended off its list."""
        self.study = study
        self.display = display
        self._forget = forget

    def finish(self, running: Running, result: TrialResult) -> None:
        """Write result.json, end the MLflow run, update the study, in this order: what the study names then exists."""
        self.study.queue.ensure_ours(running.number)
        if result.params is not None:
            running.log_result(result)
        write_result(running.folder, result)
        self.tell(running, result)

    def tell(self, running: Running, result: TrialResult) -> None:
        """End the MLflow run and tell the study what stands in result.json."""
        running.end_run(result)
        state, values = running.told(result)
        self.study.queue.tell(running.number, state, values, result.stored())
        shown = f"{result.metric.name}={result.metric.value:.4f} " if result.metric else ""
        detail = f"{shown}train_s={result.train_s or 0.0:.1f}"
        self.display.end(running.number, state, f"{detail} reason={result.reason!r}" if result.reason else detail)
        running.log.info("%s %s", state, result.reason)
        (running.folder / CHECKPOINT).unlink(missing_ok=True)
        self._close(running)

    def fail(self, running: Running, error: str) -> None:
        """End a trial as FAIL; the last line of `error` is the reason."""
        running.log.error("%s", error)
        last = error.strip().splitlines()[-1]
        try:
            self.finish(running, running.result("FAIL", last, traceback=error))
        except LostLease as lost:
            self.drop(running, str(lost))

    def fail_unopened(self, number: int, error: str) -> None:
        """Fail a trial whose point could not be drawn or composed."""
        folder, last = self.study.trial_folder(number), error.strip().splitlines()[-1]
        folder.mkdir(parents=True, exist_ok=True)
        result = TrialResult(number=number, state="FAIL", reason=last, overrides=[], params_swept={}, traceback=error)
        write_result(folder, result)
        self.study.queue.tell(number, "FAIL", None, result.stored())
        self.display.say(f"trial={number} state=FAIL reason={last!r}")

    def put_back(self, running: Running) -> None:
        """Give a saved trial back to the queue, to go on later."""
        running.track().close("KILLED")
        self.study.queue.give_back(running.number)
        self.display.end(running.number, "WAITING", f"saved at step {running.step}/{running.total_steps}")
        running.log.info("saved at step %d, put back", running.step)
        self._close(running)

    def drop(self, running: Running, why: str) -> None:
        """Forget a trial that another worker has now."""
        self.display.end(running.number, "LOST", why)
        if running.run is not None:
            running.run.leave()
        self._close(running)

    def _close(self, running: Running) -> None:
        running.close()
        self._forget(running)
