"""Which modules of a base a word such as `attention` or `all-linear` means."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from lorasweep.config.spec import TARGET_PRESETS
from lorasweep.errors import did_you_mean
from lorasweep.models import base_model
from lorasweep.models.base_model import Base
from lorasweep.models.module_kinds import Kind, kind_of, reads_no_text

ADAPTABLE = (*base_model.LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that peft's LoRA adapts, beside quantised ones."""

NO_ADAPTER = {kind: "out_proj" for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")}
"""Model type -> the layers that peft refuses to adapt there, since Mamba's kernels read their weights directly."""


# --- targets ---------------------------------------------------------------------------------------------------------


def linear_names(base: Base, heads: Sequence[str]) -> list[str]:
    """Return the modules `all-linear` means: every linear layer but the output head and new heads (peft's rule).

    Where the model has no output head, `heads` are left out as what the task calls one, and with them what peft takes
    for one, since its name ends so: DistilBERT's pre_classifier.
    """
    model = base.model
    head = model.get_output_embeddings()
    refused = NO_ADAPTER.get(model.config.model_type)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, base_model.LINEAR)
        and module is not head
        and not (head is None and name.endswith(tuple(heads)))
        and name not in base.missing
        and name.rpartition(".")[2] != refused
    ]


def preset_names(base: Base, heads: Sequence[str], preset: str) -> list[str]:
    """Return the full names of the modules that a preset means in this model."""
    return [n for n in linear_names(base, heads) if preset == "all-linear" or is_meant(preset, kind_of(n))]


def is_meant(preset: str, kind: Kind) -> bool:
    """Tell whether a preset takes in linear layers of a kind."""
    match preset:
        case "qv" | "qkvo":
            return bool(kind.roles & set(preset))
        case "attention":
            return kind.block in ("attention", "mixer")
        case "mlp":
            return kind.block == "mlp"
        case "experts":
            return kind.expert
        case _:
            return kind.block != "other"


def expert_parameters(base: Base) -> list[str]:
    """Return the 3-D parameters that hold the experts of a layer, by what their names end in in every layer."""
    names = [n for n, p in base.model.named_parameters() if p.dim() == 3 and n.split(".")[-2] == "experts"]
    return sorted({".".join(name.split(".")[-3:]) for name in names if kind_of(f"{name}.weight").block == "mlp"})


def preset_notes(base: Base, heads: Sequence[str], preset: str, with_experts: bool) -> list[str]:
    """Return what a preset finds only a part of, or takes in beside what its name says. `with_experts` tells whether
    the experts that a layer keeps in one tensor are adapted, too.
    """
    kinds = {name: kind_of(name) for name in linear_names(base, heads)}
    if preset == "all-linear":
        return _all_linear_notes(base, kinds, with_experts)
    layers = {_layer(n): "" for n, kind in kinds.items() if kind.block != "other"}
    experts = {_layer(n): "" for n, _ in base.model.named_parameters() if ".experts." in n} if with_experts else {}
    notes = []
    for part in ("attention", "mlp") if preset == "all" else (preset,):
        meant = {name: kind for name, kind in kinds.items() if is_meant(part, kind)}
        there = {_layer(name) for name in meant} | (set(experts) if part in ("mlp", "experts") else set())
        lacking = [layer for layer in layers if layer not in there]
        if preset == "all":  # which finds all that a layer has, where layers of either kind take turns
            lacking = [] if there else list(layers)
        if lacking and (there or preset == "all"):
            others = {
                n.rpartition(".")[2] for n, kind in kinds.items() if _layer(n) in lacking and kind.block != "other"
            }
            notes.append(
                f"lora.target_modules={preset}: {len(lacking)} of {len(layers)} layers have no {WORDS[part]} that LoRA "
                f"adapts as linear layers ({_some(others)} there)"
            )
        mixers = [name for name, kind in meant.items() if kind.block == "mixer"]
        if mixers:
            short = {".".join(n.split(".")[-2:]) for n in mixers}
            notes.append(
                f"lora.target_modules={preset}: in {len({_layer(n) for n in mixers})} of {len(layers)} layers "
                f"{_some(short)} take attention's place"
            )
        joined = {n.rpartition(".")[2] for n, kind in meant.items() if part == "qv" and "k" in kind.roles}
        if joined:
            notes.append(f"lora.target_modules=qv: {_some(joined)} holds the keys, too: they are one matrix")
    return notes


WORDS = {
    "attention": "attention",
    "mlp": "feed-forward network",
    "qv": "queries and values",
    "qkvo": "queries, keys, values and outputs",
    "experts": "experts",
}


def _all_linear_notes(base: Base, kinds: Mapping[str, Kind], with_experts: bool) -> list[str]:
    notes = []
    experts = expert_parameters(base)
    if experts and not with_experts:
        notes.append(
            f"lora.target_modules=all-linear: experts ({', '.join(experts)}) are no linear layers here and stay as "
            "they are; lora.target_modules=all adapts them"
        )
    unread = [name for name in kinds if reads_no_text(name)]
    if unread:
        notes.append(
            f"lora.target_modules=all-linear: {len(unread)} of {len(kinds)} modules read no text ('{unread[0]}' for "
            "one) and learn nothing; lora.target_modules=all leaves them out"
        )
    return notes


def _layer(name: str) -> tuple[str, str]:
    """Return which layer a module lies in: what holds the lists of layers, and the first number in the name.

    XLM has a list of attentions and one of feed-forward networks; both make up its layers.
    """
    match = re.match(r"(.*?)[^.]+\.(\d+)(?:\.|$)", name)
    return (match[1], match[2]) if match else ("", "")


def _some(names: Collection[str], most: int = 5) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "")


def layers_of(names: Iterable[str], patterns: str | list[str] | None) -> dict[str, list[int]]:
    """Return module list -> indices of the layers that modules lie in, as peft counts them: by the first number in a
    name, or the first one after what layers_pattern names. T5's layer 2 is thus a block of the encoder and one of the
    decoder.
    """
    lists = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?P<list>(?:^|.*?\.){name})\.(?P<index>\d+)\." for name in lists or ()]
    found: dict[str, set[int]] = {}
    for name in names:
        matches = (re.match(rule, name) for rule in rules or [FIRST_NUMBER])
        match = next((m for m in matches if m), None)
        if match and match["index"]:
            found.setdefault(match["list"], set()).add(int(match["index"]))
    return {module_list: sorted(indices) for module_list, indices in found.items()}


FIRST_NUMBER = r"(?P<list>.*?\.[^.]*)\.(?P<index>\d+)\."
"""peft's rule where no layers_pattern is given. A list at the model's very top is not seen by it."""


def described_layers(layers: Mapping[str, Sequence[int]]) -> str:
    """Return layers in words: `0 to 5 of bert.encoder.layer`."""
    return ", ".join(f"{_span(indices)} of {module_list}" for module_list, indices in layers.items())


def _span(indices: Sequence[int]) -> str:
    """Return sorted indices, a row without gaps by its ends."""
    if len(indices) > 1 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return " and ".join(map(str, indices))


def has_fused_experts(base: Base) -> bool:
    """Tell whether the model keeps all experts of a layer in one 3-D tensor, as transformers 5 does."""
    return bool(expert_parameters(base))


EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""What the projections of fused experts are called in target_modules; peft turns them into target_parameters.
On such a model peft no longer adapts a shared expert's own linear layers of these names."""


def target_problems(base: Base, targets: str | list[str], resolved: list[str]) -> list[str]:
    """Return a problem for every target that matches no module, of whatever kind (see unadaptable_problems)."""
    everything = [n for n, _ in base.model.named_modules()]
    names = [n for n, m in base.model.named_modules() if isinstance(m, (*base_model.LINEAR, nn.Embedding))]
    short = sorted({n.rpartition(".")[2] for n in names})
    has = f"it has {', '.join(short)}"
    kind = type(base.model).__name__
    if isinstance(targets, list):
        fused = set(targets) & set(EXPERTS) if has_fused_experts(base) else set()
        if len(fused & {"gate_proj", "up_proj"}) == 1:
            return ["lora.target_modules: gate_proj and up_proj of the experts are one tensor; name both or neither"]
        return [
            f"lora.target_modules: '{t}' matches no module of {kind}{did_you_mean(t, short)}"
            for t in targets
            if t not in fused and not any(n == t or n.endswith(f".{t}") for n in everything)
        ]
    if targets in TARGET_PRESETS:
        return [] if resolved else [f"lora.target_modules: preset '{targets}' matches no module of {kind}; {has}"]
    try:
        pattern = re.compile(targets)
    except re.error as error:
        return [f"lora.target_modules: '{targets}' is no regular expression ({error})"]
    if any(pattern.fullmatch(n) for n in everything):
        return []
    if any(n == targets or n.endswith(f".{targets}") for n in names):
        return [
            f"lora.target_modules: '{targets}' is read as a regular expression over whole names, and none is just "
            f"that; for the modules of this name write lora.target_modules=[{targets}]"
        ]
    return [f"lora.target_modules: '{targets}' matches no whole module name of {kind}; {has}"]


def unadaptable_problems(base: Base, targets: str | list[str], matched: list[str]) -> list[str]:
    """Return a problem where some of the modules that targets take in are of a kind that LoRA does not adapt."""
    modules = dict(base.model.named_modules())
    odd = [n for n in matched if not _is_adaptable(base, n, modules[n])]
    if not odd:
        return []
    kinds = sorted({type(modules[n]).__name__ for n in odd})
    some = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    good = sorted({n.rpartition(".")[2] for n in matched if n not in odd})
    move = f"[{','.join(good)}]" if good else "all-linear"
    written = targets if isinstance(targets, str) else f"[{','.join(targets)}]"
    return [
        f"lora.target_modules: '{written}' takes in {len(odd)} modules that LoRA does not adapt ({some}; "
        f"'{odd[0] or 'the model itself'}' for one); write lora.target_modules={move}"
    ]


def _is_adaptable(base: Base, name: str, module: nn.Module) -> bool:
    return name in base.small or isinstance(module, ADAPTABLE)


def head_problems(base: Base, targets: str | list[str], matched: list[str], in_full: Collection[str]) -> list[str]:
    """Return a problem for each target that names nothing but modules that train in full: peft leaves them out."""
    inside = [n for n in matched if any(f".{m}." in f".{n}." for m in in_full)]
    if isinstance(targets, str):
        named = {targets: matched}
    else:
        named = {t: [n for n in matched if n == t or n.endswith(f".{t}")] for t in targets}
    return [
        f"lora.target_modules: '{target}' is part of the head, which trains in full anyway; name modules of the model "
        "proper, or all-linear"
        for target, names in named.items()
        if names and set(names) <= set(inside)
    ]
