"""One training step of each kind of trial on the real model, before a study is made: what fails there fails at once.

The smallest real batch goes forward and backward, a few examples are evaluated with the task's metrics, and the adapter
is saved and loaded with plain peft, all by the code that trains. Trials that differ in numbers alone, such as rank or
learning rate, are of one kind. The base is as it was afterwards, bit for bit, and goes to who trains in this process.
"""

import copy
import json
import logging
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from lorasweep.config.fields import Affects
from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware import device
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.runner import trial_pace
from lorasweep.tasks.task import Example, Task
from lorasweep.training import workload
from lorasweep.training.engine import Engine, EvalEvent, Job, TrialEnded
from lorasweep.training.workload import Prepared, Workload

ROWS = 2
"""Examples of the step: anchors are told from one other at least."""
EVAL_ROWS = 4
TIMED_KINDS = 4
"""Kinds of trials of which a few steps are timed, at most."""
NEW_TOKENS = 4
"""Longest text that is written for a metric of generated text."""

SAME_EPS = 16
"""So many units in the last place of the largest logit two passes may differ by rounding."""

NUMBERS = ("r", "lora_alpha", "alpha_ratio", "loraplus_lr_ratio", "eva_rho", "loftq_bits", "loftq_iter")
"""Keys of `lora` that change no shape of what is computed but a size."""

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch, transformers and peft raise where a model cannot do what is asked of it."""

log = logging.getLogger(__name__)


def rehearse(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload], keep: bool) -> list[str]:
    """Try each kind of trial; return what fails. With `keep`, the first base that was loaded stays for training."""
    groups: dict[str, dict[str, TrialSpec]] = {}
    for spec in specs:
        groups.setdefault(workload.key(spec), {}).setdefault(kind(spec), spec)
    problems: list[str] = []
    last, base, load_s = "", None, 0.0
    for number, (key, kinds) in enumerate(groups.items()):
        work, some = loaded[key], list(kinds.values())
        with device.own(1, some[0].model.device_map is not None, divide=False):
            if base is None or _base_key(some[0], work.task) != last:
                base, began = None, time.perf_counter()  # one at a time
                base, wrong = _loaded(some[0], work)
                load_s = time.perf_counter() - began
                last = _base_key(some[0], work.task)
                problems += wrong
            if base is not None:
                problems += [p for spec in some if (p := _try(spec, work, base))]
            if base is not None and not problems:
                _time(dict(islice(kinds.items(), TIMED_KINDS)), work, base, load_s)
        if keep and not number:
            work.base = base
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(dict.fromkeys(problems))


def _time(kinds: Mapping[str, TrialSpec], work: Workload, base: base_model.Base, load_s: float) -> None:
    """Time a few steps of each kind of trial; what finds no room is not timed."""
    for name, spec in kinds.items():
        try:
            with _forked():
                work.paces[name] = trial_pace.measure(spec, work, base, load_s)
        except (ConfigError, *BROKEN) as error:
            log.debug("no step could be timed", exc_info=error)


def _forked() -> AbstractContextManager[None]:
    """Leave torch's random numbers as they are."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return torch.random.fork_rng(devices=list(cards))


def _base_key(spec: TrialSpec, task: Task) -> str:
    """Return a string that is equal for trials whose data may differ and whose base is the same."""
    parts = spec.affecting(Affects.BASE)
    return json.dumps([parts["model"], parts["task_type"], parts["train"], task.model_kwargs()], sort_keys=True)


def _loaded(spec: TrialSpec, work: Workload) -> tuple[base_model.Base | None, list[str]]:
    """Return the base, or why it cannot be loaded."""
    try:
        return work.loaded_base(spec), []
    except ConfigError as error:
        return None, error.problems
    except BROKEN as error:
        return None, [f"model.pretrained: cannot load '{spec.model.pretrained}' ({_line(error)})"]


def kind(spec: TrialSpec) -> str:
    """Return a string that is equal for trials of a group that compute alike, but for sizes and numbers."""
    lora = {k: v for k, v in asdict(spec.lora).items() if k not in NUMBERS}
    lora["lora_dropout"] = lora["lora_dropout"] > 0
    lora["init_lora_weights"] = None
    is_base = spec.train.max_steps == 0
    return json.dumps([lora, spec.train.gradient_checkpointing, spec.train.optimizer, is_base], sort_keys=True)


def _try(spec: TrialSpec, work: Workload, base: base_model.Base) -> str:
    """Return why a trial like this cannot train, or nothing."""
    try:
        with _forked():
            if spec.train.max_steps == 0 and base.missing:
                return _untrained_head(spec, base)
            some = _some(work, base)
            seen = _sees_what_comes(work, base, some) if work.task.auto_class == "AutoModelForCausalLM" else ""
            return (
                seen or _unused(spec, work.task, some, base) or _run(_small(spec), _small_task(work.task), some, base)
            )
    except ConfigError as error:
        return "; ".join(error.problems)
    except BROKEN as error:
        log.debug("the rehearsal failed", exc_info=error)
        line = " ".join(o for o in spec.overrides if o.startswith(("model", "task_type", "lora", "train.")))
        return f"model.pretrained: one training step on the first examples fails ({_line(error)}); tried with: {line}"


def _untrained_head(spec: TrialSpec, base: base_model.Base) -> str:
    asked = "search.baselines: base" if spec.search.baselines else "train.max_steps=0"
    return (
        f"{asked}: the {' and '.join(base.missing)} of {type(base.model).__name__} is new and answers by chance until "
        "it trains; leave it out, the trivial answer stands beside the scores anyway"
    )


def _run(spec: TrialSpec, task: Task, prepared: Prepared, base: base_model.Base) -> str:
    """Train one step, evaluate, save, load; return what went wrong without an exception."""
    jobs = iter([Job(0, spec)])
    engine = Engine(base, task, prepared)
    wrong = ""
    with tempfile.TemporaryDirectory() as folder:
        for event in engine.run(lambda: next(jobs, None)):
            if isinstance(event, EvalEvent):
                missing = [m for m in task.metric_names if m not in event.metrics]
                assert not missing, f"the task gave no {', '.join(missing)}"
            if isinstance(event, TrialEnded):
                wrong = _ended(event, Path(folder))
        return wrong or _loaded_again(Path(folder), spec, base)


def _ended(event: TrialEnded, folder: Path) -> str:
    if event.state == "FAIL":
        return f"train.micro_batch_size: even {ROWS} short examples do not fit ({event.reason})"
    if event.state == "PRUNED":
        return (
            f"train.precision: the very first step comes to nothing ({event.reason}); the weights hold no finite "
            "numbers, or need another precision"
        )
    adapter.save(event.attached, folder)
    lost = adapter.lost(event.attached, folder)
    return f"lora: peft saves an adapter without what was trained ('{lost[0]}' for one)" if lost else ""


def _loaded_again(folder: Path, spec: TrialSpec, base: base_model.Base) -> str:
    """Return why the adapter that was saved could not be used later."""
    try:
        wrong = adapter.not_loaded(folder, base, spec.lora)
        reason = f"it reads '{wrong[0]}' otherwise than saved" if wrong else ""
    except BROKEN as error:
        reason = _line(error)
    if not reason:
        return ""
    return (
        f"lora: peft cannot load the adapter that it saves for '{spec.model.pretrained}' ({reason}); choose other "
        "lora.target_modules and lora.modules_to_save, or another model"
    )


@torch.inference_mode()
def _sees_what_comes(work: Workload, base: base_model.Base, some: Prepared) -> str:
    """Return a problem where a model's answer at one token changes with the tokens after it: an encoder with a head
    for language, which would be shown what it is to predict.
    """
    ids_1T = work.task.collate([some.train[:1]], some.pad_id, base.model.device).inputs["input_ids"]
    other_1T = ids_1T.clone()
    other_1T[:, -1] = (other_1T[:, -1] + 1) % base.model.get_input_embeddings().num_embeddings
    first, second = (base.model(input_ids=ids).logits[:, :-1].float() for ids in (ids_1T, other_1T))
    if not first.numel() or not first.isfinite().all():  # one token, or nothing to compare: the step will tell
        return ""
    rounding = SAME_EPS * torch.finfo(base.model.dtype).eps * first.abs().amax()
    if (first - second).abs().amax() <= rounding:
        return ""
    return (
        f"model.pretrained: {type(base.model).__name__} reads in both directions, so that it would see the tokens it "
        "is to predict; choose a language model such as GPT-2 or Llama for task_type=causal_lm"
    )


@torch.no_grad()
def _unused(spec: TrialSpec, task: Task, some: Prepared, base: base_model.Base) -> str:
    """Return a problem where a module that is named to be trained takes no part in what the model computes, as T5's
    `shared` does not: it lends its weight to the word vectors of encoder and decoder.
    """
    lora, modules = spec.lora, dict(base.model.named_modules())
    targets = lora.target_modules if not isinstance(lora.target_modules, str) else []
    named = {"target_modules": targets, "modules_to_save": lora.modules_to_save or []}
    if not any(named.values()):
        return ""
    used: set[torch.nn.Module] = {base.model.get_output_embeddings()}  # its weight may be read in chunks
    with ExitStack() as undo:
        for module in modules.values():
            undo.callback(module.register_forward_pre_hook(lambda module, _: used.add(module)).remove)
        task.row_losses(base.model, task.collate([some.train[:ROWS]], some.pad_id, base.model.device))
    for key, names in named.items():
        for name in names:
            fits = [n for n in modules if f".{n}".endswith(f".{name}") and "experts" not in n.split(".")]
            if fits and not any(used.intersection(modules[n].modules()) for n in fits):
                return (
                    f"lora.{key}: '{fits[0]}' takes no part in what {type(base.model).__name__} computes, so that it "
                    f"would learn nothing{_instead(modules, fits[0], used)}"
                )
    return ""


def _instead(modules: Mapping[str, torch.nn.Module], name: str, used: Collection[torch.nn.Module]) -> str:
    """Return in words which modules compute with the weight of this one."""
    weight = getattr(modules[name], "weight", None)
    others = [
        n for n, m in modules.items() if m in used and weight is not None and m._parameters.get("weight") is weight
    ]
    return f"; its weight is that of {', '.join(others)}: name those" if others else "; leave it out"


def _small(spec: TrialSpec) -> TrialSpec:
    """Return the trial as one step of a small batch, with an initialisation that looks at nothing."""
    train = replace(
        spec.train,
        max_steps=1,
        batch_size=ROWS,
        micro_batch_size=None,
        eval_batch_size=EVAL_ROWS,
        eval_every=None,
        slots=1,
        prefix_cache_gib=0.0,
    )
    return replace(spec, train=train, lora=replace(spec.lora, init_lora_weights=True))


def _small_task(task: Task) -> Task:
    """Return the task, writing but a few tokens where its metrics ask for text."""
    small = copy.copy(task)
    small.spec = replace(task.spec, max_new_tokens=min(task.spec.max_new_tokens, NEW_TOKENS))
    return small


def _some(work: Workload, base: base_model.Base) -> Prepared:
    """Return the shortest training examples and the shortest of eval; on a CPU, where it costs little and an index
    beyond a table is an error one can go on from, the longest as well.
    """
    longest = base.model.device.type == "cpu"
    return Prepared(
        _shortest(work.examples["train"], ROWS, longest=False),
        _shortest(work.examples["eval"], EVAL_ROWS, longest),
        work.tokenizer.pad_token_id,
    )


def _shortest(examples: Sequence[Example], count: int, longest: bool) -> list[Example]:
    lengths = list(map(len, examples)) if not hasattr(examples, "lengths") else examples.lengths
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    chosen = order[:count] + (order[-1:] if longest and len(order) > count else [])
    return [examples[i] for i in chosen]


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
