"""A LoraSpec as a peft adapter on a shared base: attach, count, save, convert, detach, reload. The owner of peft."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from lorasweep.model import Base, preset_names, renew_missing, target_problems
from lorasweep.spec import TARGET_PRESETS, LoraSpec, TaskSpec

CHANGES_BASE = ("pissa", "olora")
"""Initialisations that take the adapter's start out of the base weights; saved as a plain LoRA of rank 2r."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, as peft counts them."""

    lora: int
    bias: int
    modules_to_save: int
    total: int
    """Base and adapter together."""

    @property
    def trainable(self) -> int:
        return self.lora + self.bias + self.modules_to_save


@dataclass
class Attached:
    """An adapter that lives on the base."""

    peft_model: Any
    base: Base
    originals: dict[str, Tensor]
    """Base weights that training or the initialisation changes, by name, as they were."""
    initial: dict[str, Tensor]
    """A and B as they began, for the conversion of PiSSA and OLoRA; empty for all others."""

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.peft_model.parameters() if p.requires_grad]


def config(lora: LoraSpec, task: TaskSpec, base: Base) -> LoraConfig:
    """Return peft's config. Raises nothing of its own: `problems` has been asked before."""
    targets: Any = lora.target_modules
    layers = lora.layers_to_transform
    if isinstance(targets, str) and targets in TARGET_PRESETS:
        wanted = [layers] if isinstance(layers, int) else layers
        targets, layers = preset_names(base, task.name, targets, wanted), None
    return LoraConfig(
        r=lora.r,
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias=lora.bias,  # type: ignore[arg-type]
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
        modules_to_save=sorted({*(lora.modules_to_save or []), *base.missing}) or None,
        layers_to_transform=layers,
        layers_pattern=lora.layers_pattern,
        task_type=task.name,
    )


def _whole(number: float) -> Any:
    """Return a whole number as an int: peft's config calls lora_alpha one, and takes any."""
    return int(number) if number == int(number) else number


def problems(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return what the LoRA keys ask of this model that it does not have."""
    wanted = config(lora, task, base).target_modules
    out = target_problems(base, lora.target_modules, list(wanted or []))
    names = [n for n, _ in base.model.named_modules()]
    for name in lora.modules_to_save or []:
        if not any(n == name or n.endswith(f".{name}") for n in names):
            short = sorted({n.rpartition(".")[2] for n in names if n and not n.rpartition(".")[2].isdigit()})
            out.append(f"lora.modules_to_save: '{name}' is no module of the model; it has {', '.join(short)}")
    return out


def attach(base: Base, lora: LoraSpec, task: TaskSpec, seed: int) -> Attached:
    """Put a fresh adapter on the base: the head drawn anew, then A and B, all from `seed`."""
    renew_missing(base, seed)
    before = {n: p for n, p in base.model.named_parameters()}
    changes = isinstance(lora.init_lora_weights, str) and lora.init_lora_weights.startswith(CHANGES_BASE)
    peft_config = config(lora, task, base)
    originals = {}
    if changes:
        originals = {n: p.detach().clone() for n, p in before.items() if n.endswith("weight") and p.dim() == 2}
    elif lora.bias != "none":
        originals = {n: p.detach().clone() for n, p in before.items() if n.endswith("bias")}
    with _quiet():
        peft_model = get_peft_model(base.model, peft_config)
    initial = {}
    if changes:
        kept = {n: w for n, w in originals.items() if not torch.equal(w, before[n])}
        if lora.bias != "none":
            kept |= {n: p.detach().clone() for n, p in before.items() if n.endswith("bias")}
        originals = kept
        initial = {n: w.clone() for n, w in get_peft_model_state_dict(peft_model).items() if ".lora_" in n}
    return Attached(peft_model, base, originals, initial)


def detach(attached: Attached) -> None:
    """Take the adapter off; the base is as it was before, bit for bit."""
    base = attached.base
    wrapped = attached.peft_model.base_model.model.named_modules()
    whole = {n: m.original_module for n, m in wrapped if isinstance(m, ModulesToSaveWrapper)}
    with _quiet():
        base.model = attached.peft_model.unload()  # leaves the trained copies of modules_to_save in place
    for name, module in whole.items():
        base.model.set_submodule(name, module)
    parameters = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, weight in attached.originals.items():
            parameters[name].copy_(weight)
    base.model.requires_grad_(False)
    base.model.eval()


def counts(attached: Attached) -> Counts:
    """Return the trainable parameters by kind, and all of them."""
    split = {"lora": 0, "bias": 0, "modules_to_save": 0}
    for name, parameter in attached.peft_model.named_parameters():
        if parameter.requires_grad:
            kind = "modules_to_save" if ".modules_to_save." in name else "lora" if ".lora_" in name else "bias"
            split[kind] += parameter.numel()
    _, total = attached.peft_model.get_nb_trainable_parameters()
    return Counts(**split, total=total)


def save(attached: Attached, folder: Path) -> float:
    """Write the adapter in peft's format and return its size in MB (10^6 bytes).

    PiSSA and OLoRA become a plain LoRA of rank 2r on the untouched base: W_res + s B A = W + s (B A - B_0 A_0).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        state = get_peft_model_state_dict(attached.peft_model)
    peft_config = copy.copy(attached.peft_model.peft_config["default"])
    peft_config.inference_mode = True
    for name, start in attached.initial.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], start], dim=0)
        else:
            state[name] = torch.cat([state[name], -start], dim=1)
    if attached.initial:
        # the scale s is alpha / r, or alpha / sqrt(r) with rsLoRA: what makes up for twice the rank
        grown = 2**0.5 if peft_config.use_rslora else 2
        peft_config.r *= 2
        peft_config.lora_alpha = _whole(peft_config.lora_alpha * grown)
        peft_config.rank_pattern = {k: 2 * v for k, v in (peft_config.rank_pattern or {}).items()}
        peft_config.alpha_pattern = {k: v * grown for k, v in (peft_config.alpha_pattern or {}).items()}
        peft_config.init_lora_weights = True
    state = {n: w.detach().cpu().clone().contiguous() for n, w in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config.save_pretrained(str(folder))
    return sum(p.stat().st_size for p in folder.iterdir()) / 1e6


def reload(folder: Path, base: Base) -> Any:
    """Return a plain peft model: the saved adapter on `base`, ready to evaluate."""
    with _quiet():
        return PeftModel.from_pretrained(base.model, str(folder)).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out peft's notices about things that are as we want them."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*(changes the base weights|Could not find a config file|is_gradient_checkpointing).*",
        )
        yield
