"""A LoRA adapter of peft on a shared base: attach, count, save, convert, detach, reload."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasweep import tasks
from lorasweep.config import registry
from lorasweep.config.spec import LoraSpec, TaskSpec
from lorasweep.errors import ConfigError
from lorasweep.files import read_json
from lorasweep.lora import inits, module_swap, peft_notices
from lorasweep.lora.peft_config import config, misread, parameter_problems, whole
from lorasweep.lora.peft_names import (
    LoraConfig,
    LoraLayer,
    ModulesToSaveWrapper,
    PeftModel,
    get_pattern_key,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from lorasweep.models.base_model import LINEAR, Base, renew_missing

Batches = Callable[[], Sequence[Mapping[str, Tensor]]]


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
    """An adapter of the base: on it, or beside it while others are."""

    peft_model: Any
    base: Base
    originals: dict[str, Tensor]
    """Base weights that training or the initialisation changes, by name, as they were."""
    initial: dict[str, Tensor]
    """A and B as they began, for the conversion of PiSSA and OLoRA; empty for all others."""
    swap: module_swap.Swap
    named: dict[str, nn.Parameter]
    """What trains, by its name in the peft model."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named)

    def put_on(self) -> None:
        """Let the base compute with this adapter."""
        self.swap.put_on()

    def take_off(self) -> None:
        """Leave the base as it was, bit for bit; the adapter can be put on again."""
        self.swap.take_off()


def attach(base: Base, lora: LoraSpec, task: TaskSpec, seed: int, batches: Batches = tuple) -> Attached:
    """Put a fresh adapter on the base: the head drawn again, then A and B, all from `seed`.

    `batches` gives the model inputs that an initialisation looks at, if it does. Raises ConfigError for
    what a quantised base cannot do, and for parameters that lie in what the checkpoint lacks.
    """
    wanted = config(lora, task, base)
    refused = inits.problems(lora, base.quantization) + parameter_problems(lora, wanted, base)
    refused += misread(wanted, base, base.model.device)
    if refused:
        raise ConfigError(refused)
    renew_missing(base, seed)
    before = dict(base.model.named_parameters())
    children = module_swap.children(base.model)
    exact = {n: before[n].data for n in _will_change(lora, before)}
    values = {n: w.clone() for n, w in exact.items()}
    try:
        peft_model = _wrapped(base, lora, wanted, batches)
        changed = [n for n, w in values.items() if before[n].requires_grad or not _same(w, before[n])]
        state = get_peft_model_state_dict(peft_model) if lora.changes_base else {}
        own = module_swap.own_weights(children, {before[n]: (exact[n], values[n]) for n in changed})
    except BaseException:
        module_swap.restore(children)
        for name, weight in values.items():
            module_swap.undone(before[name], exact[name], weight)
        base.model.requires_grad_(False)
        raise
    finally:
        base.model.__dict__.pop("peft_config", None)  # peft's mark on a model that it wrapped
    return Attached(
        peft_model,
        base,
        originals={n: before[n].detach() for n in changed},
        initial={n: w.clone() for n, w in state.items() if ".lora_A." in n or ".lora_B." in n},
        swap=module_swap.Swap(module_swap.places(children), own),
        named={n: p for n, p in peft_model.named_parameters() if p.requires_grad},
    )


def _same(values: Tensor, parameter: Tensor) -> bool:
    return values.is_meta or torch.equal(values, parameter)


def _wrapped(base: Base, lora: LoraSpec, wanted: LoraConfig, batches: Batches) -> Any:
    """Return the peft model with its initialisation done."""
    with peft_notices.left_out():
        peft_model = get_peft_model(base.model, wanted)
    if lora.full:
        _free_base(base, peft_model)
    if lora.init.finish is not None and lora.target_modules:
        lora.init.finish(peft_model, lora, base, batches)
    for wrapper in peft_model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            module_swap.keep_in_fp32(wrapper.modules_to_save["default"])
    return peft_model


def _free_base(base: Base, peft_model: Any) -> None:
    """Let every weight of the base train, those of a head that peft has copied as its copy."""
    copied = [m for m in peft_model.modules() if isinstance(m, ModulesToSaveWrapper)]
    frozen = {p for m in copied for p in m.original_module.parameters()}
    for parameter in base.model.parameters():
        if parameter.is_floating_point() and parameter not in frozen:
            parameter.requires_grad_(True)


def _will_change(lora: LoraSpec, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of base parameters that the initialisation or training may change."""
    weights = lora.changes_base or lora.rounds_base
    return [
        name
        for name, p in parameters.items()
        if lora.full
        or (weights and name.endswith("weight") and p.dim() == 2 and p.is_floating_point())
        or (lora.bias != "none" and name.endswith("bias"))
    ]


def begin_from(attached: Attached, initial: Mapping[str, Tensor]) -> None:
    """Take `initial` as the A and B that PiSSA or OLoRA began with, where the decomposition came out otherwise here.

    The base weight loses the product of the given ones, as peft takes it out.
    """
    for name in [n for n in initial if ".lora_A." in n]:
        module = name.partition(".lora_")[0]
        pair = {n: initial[n].to(attached.initial[n]) for n in (name, f"{module}.lora_B.weight")}
        if all(torch.equal(w, attached.initial[n]) for n, w in pair.items()):
            continue
        attached.initial.update(pair)
        attached.peft_model.get_submodule(module).get_base_layer().weight.data = residual(attached, module)


def residual(attached: Attached, module: str) -> Tensor:
    """Return a base weight without the product of the A and B that PiSSA or OLoRA began with, rounded as peft does."""
    A_RI, B_OR = (attached.initial[f"{module}.lora_{part}.weight"] for part in "AB")
    exact = attached.originals[f"{_in_base(module)}.weight"]
    update_OI = scale(attached, module) * B_OR @ A_RI
    turned = attached.peft_model.get_submodule(module).fan_in_fan_out
    return (exact.float() - (update_OI.T if turned else update_OI)).to(exact.dtype)


def quantised_bits(attached: Attached) -> int:
    """Return a sum over the bits of the base weights that LoftQ quantised, 0 for all else: equal for an equal base."""
    if attached.initial:
        return 0
    inner = attached.peft_model.base_model.model
    frozen = [n for n in attached.originals if f"base_model.model.{n}" not in attached.named]  # lora.full trains all
    weights = [inner.get_parameter(_inside(n)) for n in frozen if n.endswith("weight")]
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(int(w.detach().view(words[w.element_size()]).sum(dtype=torch.int64)) for w in weights)


def detach(attached: Attached) -> None:
    """Take the adapter off for good; the base is as it was before, bit for bit."""
    attached.take_off()
    attached.base.model.requires_grad_(False)
    attached.base.model.eval()


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
    with peft_notices.left_out():
        state = get_peft_model_state_dict(attached.peft_model)
    peft_config = copy.copy(attached.peft_model.peft_config["default"])
    peft_config.inference_mode = True
    peft_config.task_type = tasks.task_type_of_saved(peft_config.task_type)
    for key, value in registry.INITS.get(peft_config.init_lora_weights).saved.items():
        setattr(peft_config, key, value)
    for name, start in attached.initial.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], start], dim=0)
        else:
            state[name] = torch.cat([state[name], -start], dim=1)
    if attached.initial:
        # the scale s is alpha / r, or alpha / sqrt(r) with rsLoRA: what makes up for twice the rank
        grown = 2**0.5 if peft_config.use_rslora else 2
        peft_config.r *= 2
        peft_config.lora_alpha = whole(peft_config.lora_alpha * grown)
        peft_config.rank_pattern = {k: 2 * v for k, v in (peft_config.rank_pattern or {}).items()}
        peft_config.alpha_pattern = {k: v * grown for k, v in (peft_config.alpha_pattern or {}).items()}
        peft_config.init_lora_weights = True
    state = {n: w.detach().cpu().clone().contiguous() for n, w in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config.save_pretrained(str(folder))
    return sum(p.stat().st_size for p in folder.iterdir()) / 1e6


def tensors(attached: Attached) -> dict[str, Tensor]:
    """Return what trains, by its name in a saved adapter; to write into these tensors is to change the adapter."""
    with peft_notices.left_out():
        state = get_peft_model_state_dict(attached.peft_model)
    places = {p.data_ptr() for p in attached.parameters()}
    return {n: w for n, w in state.items() if w.data_ptr() in places}


def lost(attached: Attached, folder: Path) -> list[str]:
    """Return the names of what trains that an adapter saved in `folder`, as peft reads it, has not or has otherwise."""
    saved = load_peft_weights(str(folder), device="cpu")
    trained = tensors(attached)
    return [n for n, w in trained.items() if n not in saved or not torch.equal(w.detach().cpu(), saved[n].to(w.dtype))]


def not_loaded(folder: Path, base: Base, lora: LoraSpec) -> list[str]:
    """Load a saved adapter on the base as anybody would, with plain peft; return the names of what peft read otherwise
    than it is saved. The base is as it was afterwards, bit for bit.
    """
    before = dict(base.model.named_parameters())
    children = module_swap.children(base.model)
    values = {name: before[name].detach().clone() for name in _will_change(lora, before)}
    try:
        with peft_notices.left_out():
            state = get_peft_model_state_dict(on(base.model, folder))
        saved = load_peft_weights(str(folder), device="cpu")
        return [n for n, w in saved.items() if n not in state or not torch.equal(state[n].cpu(), w.to(state[n].dtype))]
    finally:
        module_swap.restore(children)
        with torch.no_grad():
            for name, value in values.items():
                before[name].copy_(value)
        base.model.__dict__.pop("peft_config", None)
        base.model.requires_grad_(False)


def scale(attached: Attached, module: str) -> float:
    """Return what a layer multiplies B A by."""
    return attached.peft_model.get_submodule(module).scaling["default"]


def saved_scale(folder: Path) -> Callable[[str], float]:
    """Return a function from a layer's name in a saved adapter to what it multiplies B A by."""
    saved = LoraConfig.from_pretrained(str(folder))

    def of(module: str) -> float:
        name, ranks, alphas = _in_base(module), saved.rank_pattern or {}, saved.alpha_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), name), saved.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), saved.lora_alpha)
        return alpha / (r**0.5 if saved.use_rslora else r)

    return of


def has_one_pair(attached: Attached, module: str) -> bool:
    """Tell whether a layer has one A of r rows and one B; experts have one for each."""
    layer = attached.peft_model.get_submodule(module)
    return isinstance(layer.get_base_layer(), (*LINEAR, nn.Embedding)) and not hasattr(layer, "parameter_name")


def _in_base(module: str) -> str:
    """Return a layer's name in the base model, from that in the peft model."""
    return module.removeprefix("base_model.model.")


def reload(folder: Path, base: Base, lora: LoraSpec, task: TaskSpec) -> Any:
    """Return a plain peft model: the saved adapter on `base`, ready to evaluate.

    Where the initialisation rounds a base that is not quantised, it does so first, as when the adapter was made.
    """
    if lora.rounds_base and base.quantization == "none":
        attached = attach(base, lora, task, seed=0)
        inner = attached.peft_model.base_model.model
        coarse = [n for n in attached.originals if n.endswith("weight")]
        weights = {n: inner.get_parameter(_inside(n)).detach().clone() for n in coarse}
        detach(attached)
        for name, weight in weights.items():
            base.model.get_parameter(name).data = weight
    return on(base.model, folder)


def on(model: Any, folder: Path) -> Any:
    """Return a plain peft model: the saved adapter on a model that may come from anywhere.

    Raises ConfigError for an adapter that would let peft import a module by its name.
    """
    settings = read_json(folder / "adapter_config.json") or {}
    if settings.get("megatron_config"):
        module = settings.get("megatron_core")
        raise ConfigError([f"{folder}: adapter_config.json asks peft to import '{module}'; remove megatron_config"])
    with peft_notices.left_out():
        wanted = LoraConfig.from_pretrained(str(folder))
        wanted.task_type = tasks.task_type_of_saved(wanted.task_type)  # of adapters from before it was saved so
        return PeftModel.from_pretrained(model, str(folder), config=wanted).eval()


def _inside(name: str) -> str:
    """Return where a base parameter lies while its module is wrapped."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer.{parameter}"


def saved_modules(peft_model: Any) -> list[str]:
    """Return the names, in the base, of the modules that train in full."""
    inner = peft_model.base_model.model
    return [n for n, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)]


def lora_layers(peft_model: Any) -> Iterator[Any]:
    """Yield the adapted layers."""
    return (m for m in peft_model.modules() if isinstance(m, LoraLayer))
