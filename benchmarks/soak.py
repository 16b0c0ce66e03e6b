"""Studies under random faults for some time; at the end nothing is lost, nothing is doubled, nothing is left over.

    python benchmarks/soak.py FOLDER [--minutes 60] [--trials 24] [--workers 3] [--seed 0] [--postgres]

Prints a Markdown row. Faults, one every few seconds: SIGKILL of any process, SIGTERM, SIGHUP, SIGSTOP and SIGCONT, a
small file system filled (as root, which may mount one), MLflow's server down, a file cut short while nothing runs, and
with --postgres the database restarted. After the last one the study that runs is brought to its end. All addresses are
of this machine.
"""

import argparse
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import psutil
from support import models
from support.mlflow_server import Server, in_file, in_mlflow

from lorasweep.study.study import Study

MARK = "LORASWEEP_SOAK"
"""Environment variable by which a process of this run is found, whoever its parent is now."""
PAUSE_S = (2.0, 10.0)
"""Between two faults."""
DISK_MIB = 256
LEAVE_S = 30.0
"""In which workers whose command has ended have to be gone."""
ROUND_S = 1800.0
"""Longest that a study may take after its last fault."""
SETTING = [
    "train.max_steps=60",
    "train.eval_every=15",
    "train.batch_size=8",
    "data.max_train_samples=64",
    "data.max_eval_samples=32",
    "train.device=cpu",
    "train.slots=1",  # who shares a pass decides how sums are rounded
    "search.checkpoint_s=2",
    "tracking.reload_check=false",
    "tracking.system_metrics=false",
]


class Soak:
    """One run: its folders, its processes, and what was done to them."""

    def __init__(self, folder: Path, dice: random.Random, options: argparse.Namespace) -> None:
        self.folder, self.dice, self.options = folder, dice, options
        self.outputs = folder / "disk"
        self.model = models.bert(folder / "model")
        self.server = Server(folder)
        self.mark = uuid.uuid4().hex
        self.faults: collections.Counter[str] = collections.Counter()
        self.orphans = 0
        self.storage: str | None = None
        self.restart: Callable[[], None] | None = None

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group for itself; what it says goes to a log."""
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT)}
        with (self.folder / "said.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lorasweep", *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def alive(self) -> list[psutil.Process]:
        """Return the processes that commands have left, MLflow's server aside."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # --- one study ---------------------------------------------------------------------------------------------------

    def study(self, name: str, workers: int, faults_until: float) -> Study:
        """Run a study to its end, under faults until then; go on with it as often as it ends early."""
        folder = self.outputs / name
        ranks = ",".join(str(r) for r in range(1, self.options.trials + 1))
        words = ["-m", f"lora.r={ranks}", f"model.pretrained={self.model}", f"outputs={self.outputs}", f"study={name}"]
        words += [*SETTING, f"search.workers={workers}", f"tracking.uri={self.server.uri}"]
        words += [f"search.storage={self.storage}"] if self.storage else []
        over = max(time.monotonic(), faults_until) + ROUND_S
        command = self.start(*words)
        while True:
            self._under_fire(command, folder, faults_until, over)
            self._see_orphans()
            if (folder / "study.json").exists():
                if command.returncode == 0:
                    return Study.open(folder)
                self._cut(folder, faults_until)
                words = ["resume", str(folder)]
            elif folder.exists():  # its making was cut short, as the message says
                subprocess.run(["rm", "-rf", str(folder)], check=True)
            command = self.start(*words)

    def _under_fire(self, command: subprocess.Popen[bytes], folder: Path, until: float, over: float) -> None:
        while command.poll() is None:
            if time.monotonic() > over:
                raise TimeoutError(f"{folder} does not end; see {self.folder}/said.log")
            with suppress(subprocess.TimeoutExpired):
                command.wait(self.dice.uniform(*PAUSE_S))
                return
            if time.monotonic() < until and (folder / "study.json").exists():
                self._fault(command)

    def _see_orphans(self) -> None:
        end = time.monotonic() + LEAVE_S
        while self.alive() and time.monotonic() < end:
            time.sleep(0.5)
        for process in self.alive():
            self.orphans += 1
            with suppress(psutil.Error):
                print(f"orphan: {process.pid}, {time.time() - process.create_time():.0f} s old, {process.cmdline()}")
                process.kill()

    # --- faults ------------------------------------------------------------------------------------------------------

    def _fault(self, command: subprocess.Popen[bytes]) -> None:
        kinds: dict[str, Callable[[], None]] = {
            "kill": lambda: self._any().kill(),
            "kill parent": command.kill,
            "SIGTERM": lambda: os.killpg(command.pid, signal.SIGTERM),
            "SIGHUP": lambda: os.killpg(command.pid, signal.SIGHUP),
            "stop": self._stand_still,
            "MLflow down": self._server_down,
        }
        if os.path.ismount(self.outputs):
            kinds["disk full"] = self._fill
        if self.restart is not None:
            kinds["PostgreSQL"] = self.restart
        kind = self.dice.choice(sorted(kinds))
        with suppress(psutil.Error, ProcessLookupError, IndexError):
            kinds[kind]()
            self.faults[kind] += 1

    def _any(self) -> psutil.Process:
        return self.dice.choice(self.alive())

    def _stand_still(self) -> None:
        process = self._any()
        process.suspend()
        time.sleep(self.dice.uniform(1, 5))
        process.resume()

    def _server_down(self) -> None:
        self.server.kill()
        time.sleep(self.dice.uniform(1, 5))
        self.server.start()

    def _fill(self) -> None:
        path = self.outputs / "filler"
        try:
            with path.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(2**16))
            time.sleep(self.dice.uniform(3, 8))
        finally:
            path.unlink(missing_ok=True)

    def _cut(self, folder: Path, until: float) -> None:
        """Cut a file short that a study goes on from."""
        files = [folder / "study.json", *folder.glob("*/checkpoint.pt"), *folder.glob("*/mlflow.json")]
        if self.storage:  # without the journal, study.json alone knows where the queue is
            files = files[1:]
        if time.monotonic() > until or self.dice.random() < 0.5 or not files:
            return
        path = self.dice.choice(files)
        os.truncate(path, int(path.stat().st_size * self.dice.random()))
        self.faults["file cut short"] += 1

    # --- what has to hold --------------------------------------------------------------------------------------------

    def problems(self, calm: Study, stormy: Study) -> Iterator[str]:
        """Yield what a study under faults has otherwise than the calm one."""
        self.start("sync", str(stormy.folder)).wait()
        trials = stormy.trials()
        if [t.state.name for t in trials] != ["COMPLETE"] * self.options.trials:
            yield f"states: {collections.Counter(t.state.name for t in trials)}"
        for trial in trials:
            folder = stormy.trial_folder(trial.number)
            points, twice = losses(folder)
            if twice:
                yield f"trial {trial.number}: {twice} points twice"
            if points != losses(calm.trial_folder(trial.number))[0]:
                yield f"trial {trial.number}: other losses"
            missing = in_file(folder) - in_mlflow(self.server.uri, folder)
            if missing:
                yield f"trial {trial.number}: MLflow lacks {sum(missing.values())} points"
        patterns = ("*.part", "*.tmp", "*/checkpoint.pt", "prefix*")
        left = [p for pattern in patterns for p in stormy.folder.rglob(pattern)]
        if left:
            yield f"left over: {', '.join(str(p.relative_to(stormy.folder)) for p in left)}"


def losses(folder: Path) -> tuple[dict[tuple[str, int], float], int]:
    """Return the losses of a trial by name and step, and how many of its points stand there twice."""
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    values = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        for key in point.keys() & {"train_loss", "eval_loss"}:
            found[key, point["step"]] += 1
            values[key, point["step"]] = point[key]
    return values, sum(count - 1 for count in found.values())


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system in memory, where this user may; else there is a plain folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = sys.platform == "linux" and os.geteuid() == 0 and not subprocess.run(mount, check=False).returncode
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextmanager
def database(soak: Soak) -> Iterator[None]:
    """Run a PostgreSQL server that the soak may restart."""
    if not soak.options.postgres:
        yield
        return
    import tempfile

    import pgserver

    place = Path(tempfile.mkdtemp(prefix="postgres"))  # as root the server runs as another user
    server = pgserver.get_server(place, cleanup_mode="delete")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-w", "-m", "fast", "-l", str(place / "log"), "-o", f"-h 127.0.0.1 -p {port} -k {place}", "restart"]

    def restart() -> None:
        pgserver.pg_ctl(options, pgdata=place, user=server.system_user, timeout=120)

    restart()
    soak.storage, soak.restart = f"postgresql://postgres@127.0.0.1:{port}/postgres", restart
    try:
        yield
    finally:
        server.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    soak = Soak(folder, random.Random(options.seed), options)
    wrong: list[str] = []
    studies = 0
    with small_disk(soak.outputs), database(soak):
        soak.server.start()
        try:
            calm = soak.study("calm", 1, 0.0)
            end = time.monotonic() + 60 * options.minutes
            while time.monotonic() < end:
                stormy = soak.study(f"storm{studies}", options.workers, end)
                wrong += [f"{stormy.meta.name}, {problem}" for problem in soak.problems(calm, stormy)]
                studies += 1
        finally:
            for process in soak.alive():
                process.kill()
            soak.server.kill()
    for problem in wrong:
        print(problem)
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(soak.faults.items()))
    print("| date | queue | minutes | studies | trials x workers | faults | wrong | orphans |")
    print("|---|---|--:|--:|---|---|--:|--:|")
    queue = "PostgreSQL" if soak.storage else "journal"
    sizes = f"{options.trials} x {options.workers}"
    row = [time.strftime("%Y-%m-%d"), queue, f"{options.minutes:g}", studies, sizes, faults, len(wrong), soak.orphans]
    print(f"| {' | '.join(str(cell) for cell in row)} |")
    return int(bool(wrong or soak.orphans))


if __name__ == "__main__":
    sys.exit(main())
