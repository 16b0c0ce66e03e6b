"""A LoraSpec as a peft adapter on a shared base: attach, count, save, convert, detach, reload. The owner of peft."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasweep import quant, swap
from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.model import (
    EXPERTS,
    LINEAR,
    Base,
    has_fused_experts,
    new_heads,
    preset_names,
    renew_missing,
    target_problems,
)
from lorasweep.spec import TARGET_PRESETS, LoraSpec, TaskSpec

WITH_EXPERTS = ("mlp", "all", "all-linear")
"""Presets that take in the experts of a mixture-of-experts model."""

ADAPTED_DIMS = (2, 3)
"""Dimensions of the parameters that peft adapts by name."""

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
    swap: swap.Swap
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


def config(lora: LoraSpec, task: TaskSpec, base: Base) -> LoraConfig:
    """Return peft's config. Raises nothing of its own: `problems` has been asked before."""
    targets: Any = lora.target_modules
    layers = lora.layers_to_transform
    if isinstance(targets, str) and targets in TARGET_PRESETS:
        wanted = [layers] if isinstance(layers, int) else layers
        targets, layers = _preset(base, task, targets, wanted), None
    init = lora.init_lora_weights
    return LoraConfig(
        r=lora.r,
        lora_alpha=_whole(lora.alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=lora.exclude_modules,
        target_parameters=lora.target_parameters,
        bias=lora.bias,  # type: ignore[arg-type]
        lora_bias=lora.lora_bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if init == "loftq" else init,  # type: ignore[arg-type]
        eva_config=EvaConfig(rho=lora.eva_rho) if init == "eva" else None,
        modules_to_save=sorted({*(lora.modules_to_save or []), *base.missing}) or None,
        layers_to_transform=layers,
        layers_pattern=lora.layers_pattern,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=dict(lora.alpha_pattern or {}),
        task_type=task.name,
    )


def _preset(base: Base, task: TaskSpec, preset: str, layers: list[int] | None) -> Any:
    """Return what peft is given for a preset: full names, or peft's own words where experts are among them."""
    names = preset_names(base, task.name, preset, layers)
    if not has_fused_experts(base) or preset not in WITH_EXPERTS:
        return names
    if preset == "all-linear":
        return preset
    return [n for n in names if n.rpartition(".")[2] not in EXPERTS] + list(EXPERTS)


def _expert_problems(lora: LoraSpec, base: Base) -> list[str]:
    """Return what peft cannot do on the experts that target_modules takes in."""
    targets = lora.target_modules
    meant = targets in WITH_EXPERTS if isinstance(targets, str) else bool(set(targets) & set(EXPERTS))
    if not meant or lora.target_parameters or not has_fused_experts(base):
        return []
    out = replace(lora, target_parameters=list(EXPERTS)).parameter_problems()
    if lora.layers_to_transform is not None:
        out.append("lora.layers_to_transform: peft adapts the experts of all layers; leave one of them out")
    return out


def _whole(number: float) -> Any:
    """Return a whole number as an int: peft's config calls lora_alpha one, and takes any."""
    return int(number) if number == int(number) else number


def problems(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return what the LoRA keys ask of this model that it does not have."""
    wanted = config(lora, task, base)
    out = target_problems(base, lora.target_modules, list(wanted.target_modules or [])) + _expert_problems(lora, base)
    out = out or _tied_problems(lora, wanted, base)
    out += quant.problems(lora, base.quantization)
    names = [n for n, _ in base.model.named_modules()]
    for name in lora.modules_to_save or []:
        if not any(n == name or n.endswith(f".{name}") for n in names):
            short = sorted({n.rpartition(".")[2] for n in names if n and not n.rpartition(".")[2].isdigit()})
            out.append(f"lora.modules_to_save: '{name}' is no module of the model; it has {', '.join(short)}")
    return out + _whole_problems(lora, base) + _parameter_problems(lora, task, base)


def _parameter_problems(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return a problem for every target_parameters that peft would not find, or could not adapt."""
    if not lora.target_parameters:
        return []
    wanted = config(lora, task, base)
    sizes = {n: p.dim() for n, p in base.model.named_parameters()}
    short = sorted({".".join(n.split(".")[-2:]) for n, dims in sizes.items() if dims in ADAPTED_DIMS})
    whole = {*(wanted.modules_to_save or []), *new_heads(base.model)}
    out = []
    for name in lora.target_parameters:
        found = [n for n in sizes if n == name or n.endswith(f".{name}")]
        if not found:
            out.append(
                f"lora.target_parameters: '{name}' is no parameter of {type(base.model).__name__}"
                f"{did_you_mean(name, short)}"
            )
        for one in found:
            holder = one.rpartition(".")[0]
            saved = next((m for m in whole if f".{m}." in f".{one}"), None)
            if saved is not None:
                problem = f"lies in '{saved}', which trains in full"
            elif sizes[one] not in ADAPTED_DIMS:
                problem = f"has {sizes[one]} dimensions, and peft adapts parameters of 2 or 3"
            elif check_target_module_exists(wanted, holder):
                problem = f"is adapted by lora.target_modules={lora.target_modules} already"
            else:
                continue
            out.append(f"lora.target_parameters: '{one}', which '{name}' takes in, {problem}; leave it out")
            break
    return out


def _tied_problems(lora: LoraSpec, wanted: LoraConfig, base: Base) -> list[str]:
    """Return a problem where PiSSA or OLoRA would change a weight that is another module's too."""
    if not lora.changes_base:
        return []
    holders: dict[int, list[str]] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, (*LINEAR, nn.Embedding)):
            holders.setdefault(id(module.weight), []).append(name)
    tied = {n: [o for o in names if o != n] for names in holders.values() for n in names if len(names) > 1}
    return [
        f"lora.init_lora_weights: {lora.init_lora_weights} changes the weight of '{name}', which is that of "
        f"'{others[0]}' too; leave it out of lora.target_modules, or begin otherwise"
        for name, others in tied.items()
        if isinstance(base.model.get_submodule(name), LINEAR) and check_target_module_exists(wanted, name)
    ]


def _whole_problems(lora: LoraSpec, base: Base) -> list[str]:
    """Return a problem for each module that is to train in full and holds quantised weights."""
    modules = dict(base.model.named_modules())
    return [
        f"lora.modules_to_save: '{name}' holds '{inside}', which model.quantization={base.quantization} keeps in "
        f"{quant.BITS[base.quantization]} bits; adapt it with lora.target_modules, or leave the base unquantised"
        for name in lora.modules_to_save or []
        if (inside := next((n for n in base.small if f".{name}." in f".{n}." and n in modules), None))
    ]


def misread(lora: LoraSpec, task: TaskSpec, base: Base, device: torch.device) -> list[str]:
    """Return a problem where peft's DoRA, which asks bitsandbytes for the weights, would get wrong ones."""
    if not lora.use_dora or base.quantization != "nf4" or device.type != "cpu":
        return []
    wanted = config(lora, task, base)
    widths = {n: base.model.get_submodule(n).in_features for n in base.small if check_target_module_exists(wanted, n)}
    wrong = next((n for n, width in widths.items() if quant.misreads(width)), None)
    if wrong is None:
        return []
    return [
        f"lora.use_dora: bitsandbytes reads the NF4 weights of '{wrong}' wrongly on this CPU, in rows of "
        f"{widths[wrong]}, no multiple of {quant.BLOCK}; use model.quantization=int8 or none, a GPU, or no DoRA"
    ]


def attach(base: Base, lora: LoraSpec, task: TaskSpec, seed: int, batches: Batches = tuple) -> Attached:
    """Put a fresh adapter on the base: the head drawn anew, then A and B, all from `seed`.

    `batches` gives the model inputs that eva looks at; no other initialisation asks for them. Raises ConfigError for
    what a quantised base cannot do, and for parameters that lie in what the checkpoint lacks.
    """
    refused = quant.problems(lora, base.quantization) + _parameter_problems(lora, task, base)
    if refused:
        raise ConfigError(refused)
    renew_missing(base, seed)
    before = dict(base.model.named_parameters())
    children = swap.children(base.model)
    exact = {n: before[n].data for n in _will_change(lora, before)}
    values = {n: w.clone() for n, w in exact.items()}
    try:
        peft_model = _wrapped(base, lora, task, batches)
        changed = [n for n, w in values.items() if before[n].requires_grad or not _same(w, before[n])]
        state = get_peft_model_state_dict(peft_model) if lora.changes_base else {}
        own = swap.own_weights(children, {before[n]: (exact[n], values[n]) for n in changed})
    except BaseException:
        swap.restore(children)
        for name, weight in values.items():
            swap.undone(before[name], exact[name], weight)
        base.model.requires_grad_(False)
        raise
    finally:
        base.model.__dict__.pop("peft_config", None)  # peft's mark on a model that it wrapped
    return Attached(
        peft_model,
        base,
        originals={n: before[n].detach() for n in changed},
        initial={n: w.clone() for n, w in state.items() if ".lora_A." in n or ".lora_B." in n},
        swap=swap.Swap(swap.places(children), own),
        named={n: p for n, p in peft_model.named_parameters() if p.requires_grad},
    )


def _same(values: Tensor, parameter: Tensor) -> bool:
    return values.is_meta or torch.equal(values, parameter)


def _wrapped(base: Base, lora: LoraSpec, task: TaskSpec, batches: Batches) -> Any:
    """Return the peft model with its initialisation done."""
    with _quiet():
        peft_model = get_peft_model(base.model, config(lora, task, base))
    if lora.init_lora_weights == "eva":
        _init_eva(peft_model, batches())
    if lora.init_lora_weights == "loftq":
        _init_loftq(peft_model, lora, base)
    for wrapper in peft_model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            swap.keep_in_fp32(wrapper.modules_to_save["default"])
    return peft_model


def _init_loftq(peft_model: Any, lora: LoraSpec, base: Base) -> None:
    """Let each adapter make up for what quantising its layer loses: of a quantised base, against its checkpoint."""
    found = {n: m for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    linear = {n: m for n, m in found.items() if isinstance(m.get_base_layer(), LINEAR)}
    exact = base.exact() if base.quantization != "none" else {}
    for name, layer in linear.items():
        if quant.is_quantised(layer.get_base_layer()):
            quant.make_up(layer, exact[f"{name}.weight"])
        elif base.quantization == "none":
            quant.init_loftq(layer, lora)


def _will_change(lora: LoraSpec, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of base parameters that the initialisation or training may change."""
    weights = lora.changes_base or lora.init_lora_weights == "loftq"
    return [
        name
        for name, p in parameters.items()
        if (weights and name.endswith("weight") and p.dim() == 2 and p.is_floating_point())
        or (lora.bias != "none" and name.endswith("bias"))
    ]


def _init_eva(peft_model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Let peft set A to the first singular vectors of each module's inputs, with ranks shared out anew."""
    with _quiet(), torch.no_grad():
        initialize_lora_eva_weights(
            peft_model,
            list(batches),
            forward_fn=lambda model, inputs: model.base_model.model(**inputs),
            prepare_model_inputs_fn=lambda inputs, _: inputs["attention_mask"].bool(),
            prepare_layer_inputs_fn=_real_tokens,
            show_progress_bar=False,
        )
    peft_model.eval()  # peft leaves the model in training mode, and its A in the base's number format
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _real_tokens(layer_input: Any, mask_BT: Tensor, _: str) -> Tensor:
    """Return a module's inputs [N, D] without those of padding, where it sees one vector a token."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    by_token = x.dim() == 3 and x.shape[:2] == mask_BT.shape
    return x[mask_BT] if by_token else x.reshape(-1, x.shape[-1]).contiguous()


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
    weights = [inner.get_parameter(_inside(n)) for n in attached.originals if n.endswith("weight")]
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
    with _quiet():
        state = get_peft_model_state_dict(attached.peft_model)
    peft_config = copy.copy(attached.peft_model.peft_config["default"])
    peft_config.inference_mode = True
    if peft_config.init_lora_weights == "eva":
        peft_config.init_lora_weights = True  # loading must not ask for data
        peft_config.eva_config = None  # which peft would warn of then
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


def tensors(attached: Attached) -> dict[str, Tensor]:
    """Return what trains, by its name in a saved adapter; to write into these tensors is to change the adapter."""
    with _quiet():
        state = get_peft_model_state_dict(attached.peft_model)
    places = {p.data_ptr() for p in attached.parameters()}
    return {n: w for n, w in state.items() if w.data_ptr() in places}


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


def is_linear(attached: Attached, module: str) -> bool:
    """Tell whether a layer has one A of r rows and one B; experts have one for each."""
    layer = attached.peft_model.get_submodule(module)
    return isinstance(layer.get_base_layer(), LINEAR) and not hasattr(layer, "parameter_name")


def _in_base(module: str) -> str:
    """Return a layer's name in the base model, from that in the peft model."""
    return module.removeprefix("base_model.model.")


def reload(folder: Path, base: Base, lora: LoraSpec, task: TaskSpec) -> Any:
    """Return a plain peft model: the saved adapter on `base`, ready to evaluate.

    For loftq a base that is not quantised is so first, in the same way as when the adapter was made.
    """
    if lora.init_lora_weights == "loftq" and base.quantization == "none":
        attached = attach(base, lora, task, seed=0)
        inner = attached.peft_model.base_model.model
        coarse = [n for n in attached.originals if n.endswith("weight")]
        weights = {n: inner.get_parameter(_inside(n)).detach().clone() for n in coarse}
        detach(attached)
        for name, weight in weights.items():
            base.model.get_parameter(name).data = weight
    with _quiet():
        return PeftModel.from_pretrained(base.model, str(folder)).eval()


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out peft's notices about things that are as we want them."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*(changes the base weights|with eva init|Could not find a config|is_gradient_checkpointing"
            r"|LoRA tensor\(s\) have invalid shape).*",  # a bias of B has one dimension
        )
        yield
