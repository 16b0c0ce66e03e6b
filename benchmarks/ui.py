"""Opens a study of many trials in the MLflow UI and times it, in Debian's chromium.

    python benchmarks/ui.py [--trials 500] [--points 200]

The store is made of synthetic folders that `sync` sends, as it would after a study without its server. Prints seconds
from the call of the address to the first rows of the table.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasweep import ledger, tracking

KEYS = ("train_loss", "learning_rate", "grad_norm", "tokens_per_s")
ROWS = "[role=row][row-index], tbody tr, [role=row] a[href*='/runs/']"


def make(folder: Path, trials: int, points: int) -> str:
    """Fill a study's folder and its store; return the store's URI."""
    dice = random.Random(0)
    folder.mkdir(parents=True)
    study = ledger.Ledger(experiment="lorasweep", name="many", kind="study", tags={"kind": "study", "study": "many"})
    study.end("FINISHED", ledger.now_ms())
    study.save(folder)
    for number in range(trials):
        trial = folder / str(number)
        trial.mkdir()
        r, rate = dice.choice([2, 4, 8, 16, 32, 64]), 10 ** dice.uniform(-5, -2)
        tags = {"kind": "trial", "study": "many", "trial": str(number), "state": "COMPLETE"}
        note = ledger.Ledger(experiment="lorasweep", name=f"{number} lora.r={r}", tags=tags)
        note.params = {"lora.r": str(r), "train.learning_rate": str(rate), "lora.lora_alpha": str(2 * r)}
        note.summary = {ledger.OBJECTIVE: dice.random()}
        note.end("FINISHED", ledger.now_ms())
        note.save(trial)
        line = {k: dice.random() for k in KEYS}
        lines = [json.dumps({"step": s, "time_ms": ledger.now_ms(), **line}) for s in range(1, points + 1)]
        (trial / ledger.POINTS).write_text("\n".join(lines) + "\n")
    uri = tracking.default_uri(str(folder.parent))
    began = time.perf_counter()
    print(tracking.sync(folder, uri), f"in {time.perf_counter() - began:.1f} s", flush=True)
    return uri


@contextmanager
def served(outputs: Path) -> Iterator[str]:
    """Yield the address of `python -m lorasweep ui`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lorasweep", "ui", f"outputs={outputs}", f"port={port}"]
    ui = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(ui.pid, signal.SIGKILL)
        ui.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--points", type=int, default=200)
    asked = parser.parse_args()
    outputs = Path(tempfile.mkdtemp())
    try:
        make(outputs / "many", asked.trials, asked.points)
        with served(outputs) as address:
            for attempt in ("first", "again"):
                print(f"{attempt}: rows after {opened(address):.1f} s", flush=True)
    finally:
        shutil.rmtree(outputs)


def opened(address: str) -> float:
    """Return the seconds until a fresh browser shows the table's rows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(f"{address}/#/experiments/1/runs")
        page.locator(ROWS).first.wait_for(timeout=60_000)
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


if __name__ == "__main__":
    main()
