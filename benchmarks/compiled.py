"""torch.compile and CUDA graphs on the engine's own steps; a part of benchmarks/gpu.py, the time to compile counted."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from card import Bench, afresh, examples, gap, line, reason, rounds, saved, seeds, spec_of, started, steps, timed, wait

from lorasweep.training import engine

COMPILE_S = 90.0
"""A row of torch.compile is given up after so many seconds."""
MODES = ("default", "reduce-overhead")
"""torch.compile's; the second one uses CUDA graphs."""

BATCH = 4
ROWS = [(slots, mode) for slots in (1, 4) for mode in MODES]
TINY = [(1, "default"), (4, "reduce-overhead")]
FIRST = 4
"""Rounds before the clock runs: some compile, CUDA graphs are recorded at the second and third."""
LEAST_S = 15.0
"""A row does not begin with less."""

COMPILED = ("model", "batch", "slots", "mode", "compile_s", "tokens_per_s", "over_plain", "pays_after", "graphs", "gap")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the middle of what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(bench: Bench, name: str, shape: dict[str, int]) -> None:
    """Add the rows of a model: one trial, and trials that share their passes, without and with CUDA graphs."""
    if bench.left < LEAST_S:
        bench.skipped.append(f"{name}, torch.compile: {max(0.0, bench.left):.0f} s are left")
        return
    spec = spec_of(saved(bench, name, shape), bench, BATCH)
    made = started(spec, examples(bench))
    for slots, mode in TINY if bench.tiny else ROWS:
        what, most = f"{name}, batch {BATCH}, {slots} slots, torch.compile {mode}", min(COMPILE_S, bench.left)
        if most < LEAST_S:
            bench.skipped.append(f"{what}: {max(0.0, most):.0f} s are left")
            continue
        try:
            with at_most(most):
                found = _row(bench, made, spec, slots, mode)
        except Exception as error:  # a compiler may fail in any way; the note says how
            bench.skipped.append(f"{what}: {reason(error)}")
            afresh(made)
            continue
        bench.compiled.append({"model": name, "batch": BATCH, "slots": slots, "mode": mode} | found)
        print(line(bench.compiled[-1], COMPILED), flush=True)


def _row(bench: Bench, made: engine.Engine, spec: Any, slots: int, mode: str) -> dict[str, Any]:
    """Return what compiling the model costs and gives, its output head apart."""
    _, plain_s, losses = _steps(bench, made, spec, slots)
    net = made.base.model.base_model
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled would not be counted
    net.compile(mode=mode, dynamic=False)
    try:
        first_s, round_s, found = _steps(bench, made, spec, slots)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        net._compiled_call_impl = None
        torch._dynamo.reset()
    compile_s = first_s - FIRST * round_s
    return {
        "compile_s": compile_s,
        "tokens_per_s": slots * BATCH * bench.length / round_s,
        "over_plain": plain_s / round_s,
        "pays_after": compile_s / (plain_s - round_s) if round_s < plain_s else None,
        "graphs": graphs,
        "gap": gap(found, losses),
    }


def _steps(bench: Bench, made: engine.Engine, spec: Any, slots: int) -> tuple[float, float, list[float]]:
    """Return the seconds of the first rounds, those of a later one, and the first losses of all trials."""
    events = steps(made, seeds(spec, slots), slots)
    with contextlib.closing(events):
        each, began = rounds(made, events, slots), time.perf_counter()
        losses = [loss for _ in range(FIRST) for loss in next(each)]
        wait(bench)
        first_s = time.perf_counter() - began
        done, seconds = timed(bench, each)
    return first_s, seconds / done, losses
