"""How long the report of a large study takes to make and to open, and how large it is.

    python benchmarks/report.py [folder=/tmp/x] [trials=500] [points=200]

The study is made up: random points of four parameters, curves with noise, every third trial pruned. The page is opened
in Debian's chromium where playwright is installed.
"""

import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import optuna
from support.browser import tab

from lorasweep.report import html_page
from lorasweep.search import samplers, space
from lorasweep.study.meta import StudyMeta
from lorasweep.study.study import Study

OVERRIDES = [
    "lora.r=4,8,16,32,64",
    "lora.lora_dropout=interval(0,0.5)",
    "lora.init_lora_weights=true,pissa,olora",
    "train.learning_rate=tag(log,interval(1e-5,3e-3))",
]


def made_up(folder: Path, trials: int, points: int) -> Study:
    """Return a new study whose trials have ended, with the files that trials leave."""
    found, problems = space.read(OVERRIDES)
    assert not problems, problems
    meta = StudyMeta(
        name=folder.name,
        swept=found.keys,
        overrides=OVERRIDES,
        metric="accuracy",
        maximize=True,
        created="2026-01-01T00:00:00+0000",
        question="Which rank, dropout, initialisation and learning rate together?",
        space=found.describe(),
        outputs=str(folder.parent),
    )
    study = Study.create(folder, meta, [])
    draw = random.Random(0)
    frozen = [_trial(samplers.distributions(found), draw, points) for _ in range(trials)]
    for number, trial in zip(study.queue.take_in(frozen, None), frozen, strict=True):
        _write(study.trial_folder(number), number, trial)
    return study


def _trial(known: dict, draw: random.Random, points: int) -> optuna.trial.FrozenTrial:
    point = {
        "lora.r": draw.choice([4, 8, 16, 32, 64]),
        "lora.lora_dropout": draw.uniform(0, 0.5),
        "lora.init_lora_weights": draw.choice([True, "pissa", "olora"]),
        "train.learning_rate": 10 ** draw.uniform(-5, -2.53),
    }
    rate = math.log10(point["train.learning_rate"])
    top = 0.9 - 0.08 * (rate + 3.3) ** 2 + 0.02 * math.log2(point["lora.r"] / 4) - 0.1 * point["lora.lora_dropout"]
    last = points // 4 if draw.random() < 1 / 3 else points
    curve = {10 * (i + 1): top * (1 - math.exp(-8 * (i + 1) / points)) + draw.gauss(0, 0.01) for i in range(last)}
    seconds = 3.0 * last
    pruned = last < points
    return optuna.create_trial(
        state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE,
        value=curve[10 * last],
        params=point,
        distributions={k: known[k] for k in point},
        intermediate_values=curve,
        user_attrs={
            "reason": f"asha: accuracy {curve[10 * last]:.4f} at step {10 * last}" if pruned else "",
            "steps": 10 * last,
            "train_s": seconds,
            "device_s": seconds * 1.1,
            "trainable": 18_432 * point["lora.r"],
            "adapter_mb": 0.074 * point["lora.r"],
            "peak_gib": 1.5,
        },
    )


def _write(folder: Path, number: int, trial: optuna.trial.FrozenTrial) -> None:
    folder.mkdir(parents=True)
    line = " ".join(f"{k}={v}" for k, v in trial.params.items())
    result = {"number": number, "rerun": f"python -m lorasweep {line}", "data_fingerprint": "0" * 64}
    (folder / "result.json").write_text(json.dumps(result | {"wall_s": trial.user_attrs["train_s"]}))
    (folder / "run.json").write_text(json.dumps({"seed": 0, "versions": {"torch": "2.13.0"}, "machine": "made up"}))


def opened_s(path: Path) -> float:
    """Return the seconds until a browser has loaded the page and drawn all of its figures."""
    with tab() as page:
        began = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return time.perf_counter() - began


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    folder = Path(given.get("folder") or tempfile.mkdtemp()) / "study"
    trials, points = int(given.get("trials", 500)), int(given.get("points", 200))
    study = Study.open(folder) if folder.exists() else made_up(folder, trials, points)
    began = time.perf_counter()
    path, _ = html_page.write(study)
    took = time.perf_counter() - began
    print(f"{trials} trials of {points} points: made in {took:.1f} s, {path.stat().st_size / 1e6:.2f} MB")
    print(f"opened in chromium, all figures drawn: {opened_s(path):.1f} s")


if __name__ == "__main__":
    main()
