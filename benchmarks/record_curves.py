r"""Learning curves of real LoRA runs, recorded once, for benchmarks/replay.py: a line of JSON a run.

    nice -n 19 python benchmarks/record_curves.py banking77 model.pooling=mean data=csv data.path=FOLDER \
        data.label_column=category data.test_split=test data.max_train_samples=800
    nice -n 19 python benchmarks/record_curves.py docstrings data.max_tokens=24 data.max_train_samples=800

MiniLM or the model of the overrides, packed, without pruning. A third of the settings is drawn from sweeps/lora_search,
the others near published recipes: a multiple of train.learning_rate=auto from 1/16 to 16. Some settings run again with
another seed. The evaluations lie at the twentieths of a run that TWENTIETHS names, on --eval-rows rows of the eval
split; at the end --test-rows of the test split are scored too. It may be stopped at any time and goes on behind the
lines that are there. On a small machine add lora.layers_to_transform=[5]: what the lower layers make of a text is then
computed once.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from scipy.stats import qmc

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.tasks.task import Batch, Example
from lorasweep.training import engine, evaluation, workload

TWENTIETHS = (1, 2, 4, 7, 10, 15, 20)
"""Of a run, after which it is evaluated: close together where pruners may look first."""
RUN = ["train.batch_size=8", "train.eval_every=1000000", "train.slots=8", "tracking.enabled=false"]
MODULES = ("qv", "attention", "mlp", "all-linear")
INITS = ("true", "gaussian", "pissa_niter_4", "olora", "eva")
ALPHAS = (8, 16, 32, 32, 32, 64)
DROPOUTS = (0.0, 0.0, 0.05, 0.1, 0.2, 0.3)
EVERY_THIRD = 3
"""Of the settings, from lora_search's space."""
BLOCK = 24
EVERY_FIFTH = 5
"""Of the settings runs again with another seed."""


@dataclass(frozen=True)
class Run:
    """One line of the file to be."""

    number: int
    """Of its setting."""
    seed: int
    setting: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        named = {k: str(v).lower() if isinstance(v, bool) else v for k, v in self.setting.items()}
        return [f"{key}={value}" for key, value in named.items()] + [f"train.seed={self.seed}"]


def setting(number: int, point: Sequence[float]) -> dict[str, Any]:
    """Return the setting at a point of the unit cube."""
    shared = {
        "lora.r": round(_log(point[0], 4, 128)),
        "lora.target_modules": _one_of(MODULES, point[1]),
    }
    if number % EVERY_THIRD == 0:
        init = _one_of(INITS, point[2])
        return shared | {
            "lora.lora_alpha": round(_log(point[3], 8, 64)),
            "lora.lora_dropout": round(0.05 * int(point[4] * 10.999), 2),
            "lora.init_lora_weights": init,
            **({"lora.eva_rho": _one_of((1.0, 2.0), point[5])} if init == "eva" else {}),
            "lora.use_rslora": point[6] < 0.5,
            "train.learning_rate": _log(point[7], 1e-5, 3e-3),
        }
    return shared | {
        "lora.lora_alpha": _one_of(ALPHAS, point[3]),
        "lora.lora_dropout": _one_of(DROPOUTS, point[4]),
        "lora.init_lora_weights": "gaussian" if point[5] < 0.15 else "true",
        "lora.use_rslora": point[6] < 0.15,
        "train.learning_rate": "auto",
        "train.lr_multiple": _log(point[7], 1 / 16, 16),
    }


def _log(share: float, low: float, high: float) -> float:
    return float(f"{low * (high / low) ** share:.4g}")


def _one_of(choices: Sequence[Any], share: float) -> Any:
    return choices[min(int(share * len(choices)), len(choices) - 1)]


def runs(count: int, seed: int) -> Iterator[Run]:
    """Yield the runs in their order: settings by Sobol's sequence, some with another seed too. Blocks of them go by
    rank: a pass pads the ranks of its trials.
    """
    points = qmc.Sobol(8, scramble=True, rng=seed).random(2 ** math.ceil(math.log2(count)))[:count]
    found: list[Run] = []
    for number, point in enumerate(points):
        own = setting(number, [float(p) for p in point])
        found += [Run(number, s, own) for s in ((0, 1) if number % EVERY_FIFTH == 1 else (0,))]
    for start in range(0, len(found), BLOCK):
        yield from sorted(found[start : start + BLOCK], key=lambda r: r.setting["lora.r"])


@dataclass
class Record:
    """What a run has shown."""

    run: Run
    rate: float = 0.0
    """Peak learning rate."""
    trainable: int = 0
    flops_a_token: int = 0
    tokens: int = 0
    steps: list[int] = field(default_factory=list)
    eval: list[dict[str, float]] = field(default_factory=list)
    test: dict[str, float] = field(default_factory=dict)
    state: str = ""
    train_s: float = 0.0
    eval_s: float = 0.0

    def line(self) -> str:
        out = {k: v for k, v in vars(self).items() if k not in ("run", "eval")} | vars(self.run)
        curves = {name: [round(e[name], 5) for e in self.eval] for name in (self.eval[0] if self.eval else {})}
        test = {k: round(v, 5) for k, v in self.test.items()}
        seconds = {k: round(out[k], 1) for k in ("train_s", "eval_s")}
        return json.dumps(out | seconds | {"eval": curves, "test": test}, separators=(",", ":"))


class Recorder:
    """Trains what is asked for and writes a line a run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.path = Path(given.out) / f"{given.name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.fixed = [*RUN, f"train.max_steps={given.steps}", *given.overrides]
        spec = compose.compose_trial(self.fixed)
        self.work = workload.workload(spec).keep()
        self.test = self._some("test", given.test_rows)
        some = workload.Prepared(
            self.work.examples["train"],
            self._some("eval", given.eval_rows),
            self.work.tokenizer.pad_token_id,
        )
        self.engine = engine.Engine(self.work.take_base(spec), self.work.task, some)
        self.eval_steps = frozenset(round(given.steps * k / 20) for k in TWENTIETHS)
        self.waiting = iter([r for r in runs(given.settings, given.draw_seed) if r not in self._done(given)])
        self.records: dict[int, Record] = {}

    def _some(self, split: str, count: int) -> list[Example]:
        """Return rows from all over a split, which may be sorted by class."""
        every = self.work.examples[split]
        order = np.random.default_rng(0).permutation(len(every))[:count]
        return [every[i] for i in order]

    def _done(self, given: argparse.Namespace) -> list[Run]:
        """Return the runs that the file has; a new file begins with a line on all of them."""
        if not self.path.exists():
            rows = {"train": len(self.work.examples["train"]), "eval": given.eval_rows, "test": len(self.test)}
            task = self.work.task
            about = {"name": given.name, "metric": task.primary, "steps": given.steps, "rows": rows}
            about["overrides"] = [o for o in self.fixed if not o.startswith("data.path=")]
            about["tokens_a_step"] = 8 * sum(map(len, self.work.examples["train"])) / rows["train"]
            self.path.write_text(json.dumps(about) + "\n")
        lines = [json.loads(line) for line in self.path.read_text().splitlines()[1:]]
        return [Run(d["number"], d["seed"], d["setting"]) for d in lines]

    def record(self) -> None:
        for event in self.engine.run(self._next):
            own = self.records[event.number]
            match event:
                case engine.TrialBegan():
                    own.rate, own.flops_a_token = event.peak_rate, event.flops_a_token
                    own.trainable = adapter.counts(event.attached).trainable
                case engine.StepEvent():
                    own.tokens += event.tokens
                case engine.EvalEvent():
                    own.steps.append(event.step)
                    own.eval.append(_numbers(event.metrics))
                case engine.TrialEnded():
                    self._end(own, event)

    def _next(self) -> engine.Job | None:
        run = next(self.waiting, None)
        if run is None:
            return None
        number = len(self.records)
        self.records[number] = Record(run)
        return engine.Job(number, compose.compose_trial([*self.fixed, *run.overrides]), self.eval_steps)

    def _end(self, own: Record, event: engine.TrialEnded) -> None:
        model, work = self.engine.base.model, self.work
        (slot,) = [s for s in self.engine.slots if s.number == event.number]

        def within(batch: Batch) -> AbstractContextManager[None]:
            return self.engine.passes.computing([slot], batch, False, back=False)

        pad_id = work.tokenizer.pad_token_id
        found = evaluation.predict(model, work.task, self.test, slot.spec.train, pad_id, within)
        own.test = _numbers(work.task.metrics(found))
        own.state, own.train_s, own.eval_s = event.state, event.train_s, event.eval_s
        with self.path.open("a") as file:
            file.write(own.line() + "\n")
        shown = f"{own.run.number} seed {own.run.seed}: test {own.test[work.task.primary]:.4f}"
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {shown}, {time.process_time() / 3600:.2f} CPU hours\n")
        sys.stdout.flush()


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    """Return the primary metric and the loss."""
    primary = next(iter(metrics))
    return {name: metrics[name] for name in (primary, "loss") if name in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the file, NAME.jsonl")
    parser.add_argument("--settings", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eval-rows", type=int, default=160)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--draw-seed", type=int, default=1)
    parser.add_argument("--out", default="benchmarks/curves")
    parser.add_argument("overrides", nargs="*")
    Recorder(parser.parse_intermixed_args()).record()


if __name__ == "__main__":
    main()
