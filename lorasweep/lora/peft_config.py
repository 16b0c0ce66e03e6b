"""A LoraSpec as peft's config for a model, and what the model lacks for it."""

import re
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasweep import tasks
from lorasweep.config.spec import TARGET_PRESETS, LoraSpec, TaskSpec
from lorasweep.errors import did_you_mean
from lorasweep.lora import inits
from lorasweep.lora.peft_names import (
    DUMMY_TARGET_MODULES,
    LoraConfig,
    check_target_module_exists,
    convert_peft_config_for_transformers,
    get_pattern_key,
)
from lorasweep.models import finished_head, quantization
from lorasweep.models.base_model import LINEAR, Base
from lorasweep.models.target_modules import (
    EXPERTS,
    described_layers,
    expert_parameters,
    has_fused_experts,
    head_problems,
    layers_of,
    preset_names,
    preset_notes,
    target_problems,
    unadaptable_problems,
)

WITH_EXPERTS = ("mlp", "experts", "all", "all-linear")
"""Presets that take in the experts of a mixture-of-experts model."""

ADAPTED_DIMS = (2, 3)
"""Dimensions of the parameters that peft adapts by name."""


def config(lora: LoraSpec, task: TaskSpec, base: Base) -> LoraConfig:
    """Return peft's config. It checks nothing: call `problems` first."""
    targets: Any = lora.target_modules if lora.target_modules or lora.target_parameters else DUMMY_TARGET_MODULES
    parameters = lora.target_parameters
    layers, layers_pattern = lora.layers_to_transform, lora.layers_pattern
    if isinstance(targets, str) and targets in TARGET_PRESETS:
        targets, parameters = _preset(base, task, lora)
        layers, layers_pattern = None, None
    missing = () if lora.full else base.missing  # all weights train then, the head's too
    return LoraConfig(
        r=lora.r,
        lora_alpha=whole(lora.alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=lora.exclude_modules,
        target_parameters=parameters,
        bias=lora.bias,  # type: ignore[arg-type]
        lora_bias=lora.lora_bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=sorted({*(lora.modules_to_save or []), *missing}) or None,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=_alphas(lora),
        task_type=tasks.kind(task.name).peft_type,
        **lora.init.in_peft(lora),
    )


def _alphas(lora: LoraSpec) -> dict[str, Any]:
    """Return peft's alpha_pattern: what is given, and alpha_ratio times each rank of rank_pattern beside that."""
    alphas: dict[str, Any] = dict(lora.alpha_pattern or {})  # first, since peft takes the first that fits
    if lora.alpha_ratio is not None:
        for name, r in (lora.rank_pattern or {}).items():
            alphas.setdefault(name, whole(lora.alpha_ratio * r))
    return alphas


def _preset(base: Base, task: TaskSpec, lora: LoraSpec) -> tuple[Any, list[str] | None]:
    """Return peft's target_modules and target_parameters for a preset.

    Modules go by their full names, or by peft's own words where it turns experts' names into parameters itself.
    """
    preset = str(lora.target_modules)
    names = preset_names(base, tasks.kind(task.name).head_names, preset)
    if lora.layers_to_transform is not None:
        names = _within_layers(names, lora)
    if not takes_experts(lora, base):
        return names, lora.target_parameters
    if not converts_experts(base):
        return names, sorted({*(lora.target_parameters or ()), *expert_parameters(base)})
    if preset == "all-linear":
        return preset, lora.target_parameters
    return [n for n in names if n.rpartition(".")[2] not in EXPERTS] + list(EXPERTS), lora.target_parameters


def takes_experts(lora: LoraSpec, base: Base) -> bool:
    """Tell whether target_modules takes in experts that a layer keeps in one tensor.

    all-linear does where peft has it so: where it knows how earlier versions kept them as linear layers.
    """
    targets = lora.target_modules
    if not has_fused_experts(base):
        return False
    if isinstance(targets, str):
        return targets in WITH_EXPERTS and (targets != "all-linear" or converts_experts(base))
    return bool(set(targets) & set(EXPERTS))


def converts_experts(base: Base) -> bool:
    """Tell whether peft turns the names that experts' layers had in transformers 4 into parameters of this model."""
    asked = LoraConfig(target_modules=list(EXPERTS))
    convert_peft_config_for_transformers(asked, base.model, None)
    return bool(asked.target_parameters)


def notes(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return what a preset of target_modules finds only a part of, and which adapted modules share their weight."""
    tied = _tied_notes(lora, task, base)
    if not isinstance(lora.target_modules, str) or lora.target_modules not in TARGET_PRESETS:
        return tied
    preset, heads = lora.target_modules, tasks.kind(task.name).head_names
    out = preset_notes(base, heads, preset, takes_experts(lora, base))
    if takes_experts(lora, base) and converts_experts(base):
        left = [n for n in preset_names(base, heads, preset) if n.rpartition(".")[2] in EXPERTS]
        if left:
            out.append(
                f"lora.target_modules={preset}: peft adapts the experts, and {len(left)} linear layers of these names "
                f"stay as they are ('{left[0]}' for one)"
            )
    return [*out, *tied]


def _within_layers(names: list[str], lora: LoraSpec) -> list[str]:
    """Return the modules that peft would adapt of these, were their last parts the list that target_modules is.

    Full names would not do: peft takes what is named in full whatever its layer.
    """
    suffixes = LoraConfig(
        target_modules=sorted({n.rpartition(".")[2] for n in names}),
        layers_to_transform=lora.layers_to_transform,
        layers_pattern=lora.layers_pattern,
    )
    return [n for n in names if "." in n and check_target_module_exists(suffixes, n)]


def _layer_problems(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return a problem where layers_to_transform and layers_pattern take in no module, or not all layers are there."""
    asked, patterns = lora.layers_to_transform, lora.layers_pattern
    if asked is None:
        return []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            re.compile(pattern)
        except re.error as error:
            return [f"lora.layers_pattern: '{pattern}' is no regular expression ({error})"]
    everywhere = config(replace(lora, layers_to_transform=None, layers_pattern=None), task, base)
    names = [n for n, _ in base.model.named_modules() if check_target_module_exists(everywhere, n)]
    if not names:  # said of target_modules
        return []
    layers = layers_of(names, patterns)
    if not layers:
        lists = sorted(set(chain.from_iterable(re.findall(r"([^.]+)\.\d+\.", name) for name in names)))
        if patterns:
            return [f"lora.layers_pattern: '{patterns}' numbers none of the adapted modules{_choice(lists)}"]
        return [
            f"lora.layers_to_transform: peft finds no number in '{names[0]}'; give lora.layers_pattern{_choice(lists)}"
        ]
    there = set(chain.from_iterable(layers.values()))
    return [
        f"lora.layers_to_transform: no adapted module lies in layer {index}; there is {described_layers(layers)}"
        for index in ([asked] if isinstance(asked, int) else asked)
        if index not in there
    ]


def _choice(lists: list[str]) -> str:
    return f"; module lists are {', '.join(lists)}" if lists else "; there is no module list"


def _expert_problems(lora: LoraSpec, base: Base) -> list[str]:
    """Return what peft cannot do on the experts that target_modules takes in."""
    if lora.target_parameters or not takes_experts(lora, base):
        return []
    out = replace(lora, target_parameters=list(EXPERTS)).parameter_problems()
    if lora.layers_to_transform is not None:
        out.append("lora.layers_to_transform: peft adapts the experts of all layers; leave one of them out")
    return out


def whole(number: float) -> Any:
    """Return a whole number as an int: peft's config calls lora_alpha one, and takes any."""
    return int(number) if number == int(number) else number


def problems(lora: LoraSpec, task: TaskSpec, base: Base, device: torch.device | None = None) -> list[str]:
    """Return what the LoRA keys ask of this model that it does not have, and, with a device, what fails there."""
    out = _layer_problems(lora, task, base)
    if out:
        return out
    if not lora.target_modules and not lora.target_parameters:
        return _without_targets(lora, base)
    wanted = config(lora, task, base)
    resolved = [*(wanted.target_modules or ()), *(wanted.target_parameters or ())]
    out = target_problems(base, lora.target_modules, resolved) + _expert_problems(lora, base)
    out = out or _kind_problems(lora, wanted, base) or _tied_problems(lora, wanted, base)
    if not out:
        out = _pattern_problems(lora, task, wanted, base) + _init_problems(lora, wanted, base)
    out += inits.problems(lora, base.quantization)
    names = [n for n, _ in base.model.named_modules()]
    for name in lora.modules_to_save or []:
        if not any(n == name or n.endswith(f".{name}") for n in names):
            short = sorted({n.rpartition(".")[2] for n in names if n and not n.rpartition(".")[2].isdigit()})
            out.append(f"lora.modules_to_save: '{name}' is no module of the model; it has {', '.join(short)}")
    out += _whole_problems(lora, base) + parameter_problems(lora, wanted, base)
    return out if device is None else out + misread(wanted, base, device)


def _without_targets(lora: LoraSpec, base: Base) -> list[str]:
    """Return a problem where no module is adapted and nothing else is there to train."""
    if lora.full:
        return _full_problems(base)
    if lora.modules_to_save or finished_head.heads(base.model):
        return _whole_problems(lora, base)
    return [
        f"lora.target_modules: an empty list adapts nothing, and {type(base.model).__name__} has no new head to train "
        "alone; name modules (search.baselines: leave head out)"
    ]


def _full_problems(base: Base) -> list[str]:
    if base.quantization == "none":
        return []
    return [
        f"lora.full: model.quantization={base.quantization} keeps weights that cannot train; leave the base unquantised"
    ]


def adapted(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return the names of the modules that peft adapts; peft's own word for all, where that is what it is given."""
    wanted = config(lora, task, base)
    if wanted.target_modules == "all-linear":
        return ["all-linear"]
    return [n for n, _ in base.model.named_modules() if check_target_module_exists(wanted, n)]


def _kind_problems(lora: LoraSpec, wanted: LoraConfig, base: Base) -> list[str]:
    """Ask peft's own question of each module that it takes in: can it be adapted?"""
    if not wanted.target_modules or (isinstance(lora.target_modules, str) and lora.target_modules in TARGET_PRESETS):
        return []
    matched = [n for n, _ in base.model.named_modules() if check_target_module_exists(wanted, n)]
    in_full = {*(wanted.modules_to_save or []), *finished_head.heads(base.model)}
    proper = [n for n in matched if not any(f".{m}." in f".{n}." for m in in_full)]
    problems = head_problems(base, lora.target_modules, matched, in_full)
    return problems or unadaptable_problems(base, lora.target_modules, proper)


def parameter_problems(lora: LoraSpec, wanted: LoraConfig, base: Base) -> list[str]:
    """Return a problem for every target_parameters that peft would not find, or could not adapt."""
    if not lora.target_parameters:
        return []
    sizes = {n: p.dim() for n, p in base.model.named_parameters()}
    short = sorted({".".join(n.split(".")[-2:]) for n, dims in sizes.items() if dims in ADAPTED_DIMS})
    in_full = {*(wanted.modules_to_save or []), *finished_head.heads(base.model)}
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
            saved = next((m for m in in_full if f".{m}." in f".{one}"), None)
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
    """Return a problem where PiSSA, OLoRA or LoftQ would change a weight that is another module's too."""
    rounds = lora.rounds_base and base.quantization == "none"
    if not (lora.changes_base or rounds):
        return []
    return [
        f"lora.init_lora_weights: {lora.init_lora_weights} changes the weight of '{name}', which is that of "
        f"'{others[0]}' too; leave it out of lora.target_modules, or begin otherwise"
        for name, others in _tied(base).items()
        if isinstance(base.model.get_submodule(name), LINEAR) and check_target_module_exists(wanted, name)
    ]


def _tied(base: Base) -> dict[str, list[str]]:
    """Return module -> the others that have its very weight."""
    holders: dict[int, list[str]] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, (*LINEAR, nn.Embedding)):
            holders.setdefault(id(module.weight), []).append(name)
    tied: dict[str, list[str]] = {}
    for names in holders.values():
        if len(names) > 1:
            tied |= {name: [other for other in names if other != name] for name in names}
    return tied


def _tied_notes(lora: LoraSpec, task: TaskSpec, base: Base) -> list[str]:
    """Return a note for each adapted module that shares its weight with others."""
    tied = _tied(base)
    if not tied:
        return []
    wanted = config(lora, task, base)
    whole = wanted.modules_to_save or []
    return [
        f"'{name}' has the weight of '{others[0]}': what it learns is for it alone, and a merged export stores both"
        for name, others in tied.items()
        if check_target_module_exists(wanted, name) or any(name == w or name.endswith(f".{w}") for w in whole)
    ]


def _pattern_problems(lora: LoraSpec, task: TaskSpec, wanted: LoraConfig, base: Base) -> list[str]:
    """Return a problem for each pattern of ranks or alphas that fits nothing that is adapted: peft passes over it."""
    if not (lora.rank_pattern or lora.alpha_pattern):
        return []
    names = [n for n, _ in base.model.named_modules() if check_target_module_exists(wanted, n)]
    experts = EXPERTS if takes_experts(lora, base) else ()
    parameters = [*(wanted.target_parameters or ()), *(expert_parameters(base) if experts else ())]
    names += [n for n, _ in base.model.named_parameters() if n.endswith(tuple(parameters))]
    if wanted.target_modules == "all-linear":
        names += preset_names(base, tasks.kind(task.name).head_names, "all-linear")
    out = []
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns or {}:
            try:
                fits = any(n == pattern or get_pattern_key([pattern], n) == pattern for n in names)
            except re.error as error:
                out.append(f"lora.{field}: '{pattern}' is no regular expression ({error})")
                continue
            if not fits and pattern.rpartition(".")[2] not in experts:
                short = sorted({n.rpartition(".")[2] for n in names})
                out.append(
                    f"lora.{field}: '{pattern}' fits no adapted module{did_you_mean(pattern, short)}; it has to fit "
                    "the end of a name, from a dot or from the beginning"
                )
    return out


def _init_problems(lora: LoraSpec, wanted: LoraConfig, base: Base) -> list[str]:
    """Return a problem for the first layer of each kind that this initialisation has no start for."""
    if inits.OTHER in lora.init.layers:  # it draws at random, whatever the layer
        return []
    out: dict[str, str] = {}
    for name, module in base.model.named_modules():
        if not check_target_module_exists(wanted, name):
            continue
        reason = _no_start(lora, wanted, name, module)
        if reason:
            out.setdefault(
                type(module).__name__,
                f"lora.init_lora_weights: {lora.init_lora_weights} has no start for '{name}' ({reason}); take true or "
                "gaussian, or leave it out of lora.target_modules",
            )
    return list(out.values())


def _no_start(lora: LoraSpec, wanted: LoraConfig, name: str, module: nn.Module) -> str:
    """Return why an initialisation that looks at weights or inputs cannot begin at this layer, "" where it can."""
    kind = _kind(module)
    if kind not in lora.init.layers:
        return {
            inits.EMBEDDING: "a table of vectors, where peft would begin as with true",
            inits.CONV1D: "Conv1D keeps its weight transposed, and peft would take it as it lies",
        }.get(kind, f"{type(module).__name__}; it is for linear layers")
    if not lora.changes_base or quantization.is_quantised(module):  # 4-bit weights have another shape
        return ""
    ranks = wanted.rank_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), lora.r)
    most = min(module.get_parameter("weight").shape)
    return f"its weight has {most} directions, fewer than the rank {r}" if r > most else ""


def _kind(module: nn.Module) -> str:
    """Return what a module is to an initialisation."""
    if isinstance(module, Conv1D):
        return inits.CONV1D
    if isinstance(module, nn.Embedding):
        return inits.EMBEDDING
    return inits.LINEAR if isinstance(module, LINEAR) else inits.OTHER


def _whole_problems(lora: LoraSpec, base: Base) -> list[str]:
    """Return a problem for each module that is to train in full and holds quantised weights."""
    modules = dict(base.model.named_modules())
    problems = []
    for name in lora.modules_to_save or []:
        inside = next((n for n in base.small if f".{name}." in f".{n}." and n in modules), None)
        if inside is not None:
            problems.append(
                f"lora.modules_to_save: '{name}' holds '{inside}', which model.quantization={base.quantization} keeps "
                f"in {quantization.BITS[base.quantization]} bits; adapt it with lora.target_modules, or leave the base "
                "unquantised"
            )
    return problems


def misread(wanted: LoraConfig, base: Base, device: torch.device) -> list[str]:
    """Return a problem where peft's DoRA, which asks bitsandbytes for the weights, would get wrong ones."""
    if not wanted.use_dora or base.quantization != "nf4" or device.type != "cpu":
        return []
    widths = {n: base.model.get_submodule(n).in_features for n in base.small if check_target_module_exists(wanted, n)}
    wrong = next((n for n, width in widths.items() if quantization.misreads(width)), None)
    if wrong is None:
        return []
    return [
        f"lora.use_dora: bitsandbytes reads the NF4 weights of '{wrong}' wrongly on this CPU, in rows of "
        f"{widths[wrong]}, no multiple of {quantization.BLOCK}; use model.quantization=int8 or none, a GPU, or no DoRA"
    ]
