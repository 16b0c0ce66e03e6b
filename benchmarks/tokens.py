"""The data of a start as tokens: made, and found on disk; seconds and resident memory, each in a process of its own.

    python benchmarks/tokens.py --rounds 3 data=csv data.path=FOLDER data.label_column=category data.test_split=test
    python benchmarks/tokens.py --rounds 1 --synthetic 200000

Prints a row a round: seconds from the imported program to the data ready for training (the file read, the task fitted,
tokenised or found), of that what tokens took; and the memory that the process holds more than before, with the records.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def one(overrides: list[str]) -> None:
    """Get the data ready, and print what it took."""
    from lorasweep.config import compose
    from lorasweep.models import base_model
    from lorasweep.tasks import token_cache
    from lorasweep.training import workload

    spec = compose.compose_trial(overrides)
    base_model.load_tokenizer(spec.model)
    spent = 0.0
    own = {name: getattr(token_cache, name) for name in ("read", "encoded", "place", "write")}

    def timed(name):
        def run(*args):
            nonlocal spent
            began = time.perf_counter()
            out = own[name](*args)
            spent += time.perf_counter() - began
            return out

        return run

    for name in own:
        setattr(token_cache, name, timed(name))
    before, began = resident_mib(), time.perf_counter()
    work = workload.workload(spec).keep()
    took = time.perf_counter() - began
    held = resident_mib() - before
    count = sum(len(e) for e in work.examples.values())
    kind = type(work.examples["train"]).__name__
    print(json.dumps({"s": took, "tokens_s": spent, "mib": held, "examples": count, "kind": kind}))


def measured(overrides: list[str], more: list[str]) -> dict:
    command = [sys.executable, __file__, "--one", *more, *overrides]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def synthetic(folder: Path, rows: int) -> list[str]:
    """Write a table of sentences of 10 to 60 words, and return the overrides that read it."""
    dice = random.Random(0)
    words = Path(__file__).read_text().split() + [f"word{i}" for i in range(2000)]
    with (folder / "train.csv").open("w") as file:
        file.write("text,label\n")
        for _ in range(rows):
            text = " ".join(dice.choices(words, k=dice.randint(10, 60))).replace('"', "")
            file.write(f'"{text}",{dice.randrange(20)}\n')
    return ["data=csv", f"data.path={folder}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--synthetic", type=int, default=0, help="rows of made-up text instead of data")
    parser.add_argument("--cpu", action="store_true", help="count a process's CPU seconds: for a busy machine")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    if given.one:
        if given.cpu:
            time.perf_counter = time.process_time
        one(given.overrides)
        return
    print("| examples | made, s | of that tokens | found, s | of that tokens | in lists, MiB | found, MiB |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            own = synthetic(folder, given.synthetic) if given.synthetic else []
            full = folder / "full"  # a file where the store would be: the tokens stay in memory
            full.mkdir()
            (full / ".tokens").write_text("")
            more = ["--cpu"] if given.cpu else []
            lists = measured([*own, *given.overrides, f"outputs={full}"], more)
            first, second = (measured([*own, *given.overrides, f"outputs={folder / 'out'}"], more) for _ in range(2))
            assert lists["kind"] == "list" and second["kind"] == "Examples", (lists, second)
        print(
            f"| {second['examples']:,} | {first['s']:.2f} | {first['tokens_s']:.2f} | {second['s']:.2f} "
            f"| {second['tokens_s']:.2f} | {lists['mib']:.0f} | {second['mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
