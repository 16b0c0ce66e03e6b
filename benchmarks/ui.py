"""Opens a study of many trials in the MLflow UI and times it, in Debian's chromium.

    python benchmarks/ui.py [--trials 500] [--points 200]

The store is made of synthetic folders that `sync` sends, as it would after a study without its server. Prints seconds
from the call of the address to the first rows of the table, and from the click on + to the first trials of the study
(MLflow loads them page by page).
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.browser import ROWS, close_panel, expand, open_runs, served, tab

from lorasweep.tracking import outbox, runs

KEYS = ("train_loss", "learning_rate", "grad_norm", "tokens_per_s")


def make(folder: Path, trials: int, points: int) -> str:
    """Fill a study's folder and its store; return the store's URI."""
    dice = random.Random(0)
    folder.mkdir(parents=True)
    study = outbox.Ledger(experiment="lorasweep", name="many", kind="study", tags={"kind": "study", "study": "many"})
    study.end("FINISHED", outbox.now_ms())
    study.save(folder)
    for number in range(trials):
        trial = folder / str(number)
        trial.mkdir()
        r, rate = dice.choice([2, 4, 8, 16, 32, 64]), 10 ** dice.uniform(-5, -2)
        tags = {"kind": "trial", "study": "many", "trial": str(number), "state": "COMPLETE"}
        note = outbox.Ledger(experiment="lorasweep", name=f"{number} lora.r={r}", tags=tags)
        note.params = {"lora.r": str(r), "train.learning_rate": str(rate), "lora.lora_alpha": str(2 * r)}
        note.summary = {outbox.OBJECTIVE: dice.random()}
        note.end("FINISHED", outbox.now_ms())
        note.save(trial)
        line = {k: dice.random() for k in KEYS}
        lines = [json.dumps({"step": s, "time_ms": outbox.now_ms(), **line}) for s in range(1, points + 1)]
        (trial / outbox.POINTS).write_text("\n".join(lines) + "\n")
    uri = runs.default_uri(str(folder.parent))
    began = time.perf_counter()
    print(runs.sync(folder, uri), f"in {time.perf_counter() - began:.1f} s", flush=True)
    return uri


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
                shown, wide = opened(address)
                print(
                    f"{attempt}: table after {shown:.1f} s, its study open to the first trials {wide:.1f} s later",
                    flush=True,
                )
    finally:
        shutil.rmtree(outputs)


def opened(address: str) -> tuple[float, float]:
    """Return the seconds until a fresh browser shows the table, and those from + to its trials."""
    with tab(viewport={"width": 1280, "height": 720}) as page:
        began = time.perf_counter()
        open_runs(page, address)
        shown = time.perf_counter() - began
        close_panel(page)
        began = time.perf_counter()
        expand(page)
        page.locator(ROWS, has_text="lora.r=").first.wait_for(timeout=60_000)
        return shown, time.perf_counter() - began


if __name__ == "__main__":
    main()
