"""How an adapter begins: one entry for each value of lora.init_lora_weights.

An entry says all that the rest asks: what the settings may combine it with, what becomes of the base, what is saved,
estimated and shown. The settings are checked with it before torch is there, so torch and peft are imported late.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.config import registry
from lorasweep.config.spec import LoraSpec

LINEAR = "linear"
CONV1D = "Conv1D"
"""GPT-2's linear layer, whose weight lies transposed."""
EMBEDDING = "embedding"
EXPERTS = "experts"
"""3-D parameters of a mixture of experts."""
OTHER = "other"
"""All else that peft adapts, such as convolutions."""


def _as_it_is(lora: LoraSpec) -> dict[str, Any]:
    return {"init_lora_weights": lora.init_lora_weights}


def _no_problems(lora: LoraSpec) -> list[str]:
    return []


def _no_problems_quantised(lora: LoraSpec, quantization: str) -> list[str]:
    return []


def _never(lora: LoraSpec) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Init:
    """A way to begin. The defaults are those of one that leaves the base and its answers alone and looks at no data."""

    name: str
    """As it is written; N stands for a whole number from 1."""
    takes: Callable[[object], bool] | None = None
    """Tells the values that it stands for; None: its name."""
    rate: float = 1.0
    """How train.learning_rate=auto differs for it: it begins farther from zero."""
    layers: frozenset[str]
    """Kinds of what an adapter lies on, out of the above, that it has a start for."""
    start: str = "the fresh adapter equals the base model"
    """What `check` says of it."""
    start_quantised: str = ""
    """The same on a quantised base; "": no different."""
    changes_base: bool = False
    """Takes its start out of the base weights: the trial has weights of its own in their place, and its adapter is
    saved with twice the rank, for the base as it was."""
    rounds_base: bool = False
    """Quantises the adapted weights of a base that is not quantised, and so has to do that again wherever the adapter
    is used."""
    note: str = ""
    """What the card of an exported adapter says to whoever loads it."""
    sees: Callable[[LoraSpec], int] | None = None
    """Tells how many training examples it has to see at once; None: it looks at none."""
    sees_rule: str = ""
    """That number in terms of the settings."""
    dora: bool = True
    """Whether peft begins DoRA so."""
    lora_bias: bool = False
    """Whether peft begins so where B has a bias."""
    problems: Callable[[LoraSpec], list[str]] = _no_problems
    """Says what it cannot do with these settings."""
    on_quantised: Callable[[LoraSpec, str], list[str]] = _no_problems_quantised
    """Says what it cannot do on a base of this model.quantization."""
    needs_bitsandbytes: Callable[[LoraSpec], bool] = _never
    """Tells whether it needs bitsandbytes where the base is not quantised."""
    in_peft: Callable[[LoraSpec], dict[str, Any]] = _as_it_is
    """Gives the arguments of peft's LoraConfig that ask for it."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """What the saved adapter's config has for these, so that loading does not initialise again."""
    finish: Callable[..., None] | None = None
    """Does what peft leaves undone, given the peft model, the settings, the base and a function that gives the model
    inputs of some training examples."""

    @property
    def experts(self) -> bool:
        return EXPERTS in self.layers


def add(init: Init) -> None:
    """Make an initialisation known under its name."""
    registry.INITS.add(init.name, init, init.takes)


def problems(lora: LoraSpec, quantization: str) -> list[str]:
    """Return what an initialisation cannot do on a base of this model.quantization."""
    return [] if quantization == "none" else lora.init.on_quantised(lora, quantization)


# --- drawn at random -------------------------------------------------------------------------------------------------

FARTHER = 0.25
"""What a start with a larger A, or with the base's main directions, leaves of the learning rate."""

EVERYTHING = frozenset({LINEAR, CONV1D, EMBEDDING, EXPERTS, OTHER})

add(Init(name="true", takes=lambda value: value is True, layers=EVERYTHING, lora_bias=True))
add(
    Init(
        name="false",
        takes=lambda value: value is False,
        layers=EVERYTHING,
        lora_bias=True,
        start="init_lora_weights=false draws B too: the fresh adapter differs from the base model",
    )
)
add(Init(name="gaussian", layers=EVERYTHING, rate=FARTHER))


# --- out of the base's weights ---------------------------------------------------------------------------------------


def _rounded_anew(lora: LoraSpec, quantization: str) -> list[str]:
    return [
        f"lora.init_lora_weights: {lora.init_lora_weights} takes the adapter's start out of the base weights, which "
        f"model.quantization={quantization} rounds anew; use loftq, or model.quantization=none"
    ]


def _is_pissa_niter(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value) is not None


# peft's olora decomposes the weight as it lies, which for Conv1D is the transposed one
add(Init(name="olora", rate=FARTHER, layers=frozenset({LINEAR}), changes_base=True, on_quantised=_rounded_anew))
add(Init(name="pissa", rate=FARTHER, layers=frozenset({LINEAR, CONV1D}), changes_base=True, on_quantised=_rounded_anew))
add(
    Init(
        name="pissa_niter_N",
        rate=FARTHER,
        takes=_is_pissa_niter,
        layers=frozenset({LINEAR, CONV1D}),
        changes_base=True,
        on_quantised=_rounded_anew,
    )
)


# --- orthogonal ------------------------------------------------------------------------------------------------------


def _odd_ranks(lora: LoraSpec) -> list[str]:
    odd = [r for r in (lora.r, *(lora.rank_pattern or {}).values()) if r % 2]
    return [f"lora.r: must be even with init_lora_weights=orthogonal, got {odd[0]}"] if odd else []


def _no_whole_numbers(lora: LoraSpec, quantization: str) -> list[str]:
    return [
        "lora.init_lora_weights: peft draws orthogonal in the weights' number format, and quantised ones are whole "
        "numbers; use true or gaussian, or model.quantization=none"
    ]


add(Init(name="orthogonal", layers=frozenset({LINEAR, CONV1D}), problems=_odd_ranks, on_quantised=_no_whole_numbers))


# --- loftq -----------------------------------------------------------------------------------------------------------


def _other_rounding(lora: LoraSpec, quantization: str) -> list[str]:
    from lorasweep.models.quantization import BITS

    out = []
    if lora.loftq_bits != BITS[quantization]:
        out.append(
            f"lora.loftq_bits: must be {BITS[quantization]} with model.quantization={quantization}, got "
            f"{lora.loftq_bits}; it makes up for the base's own rounding"
        )
    if lora.loftq_iter > 1:
        out.append(
            f"lora.loftq_iter: must be 1 with model.quantization={quantization}, got {lora.loftq_iter}; more rounds "
            "would quantise a base for each trial, and trials share one"
        )
    return out


def _finish_loftq(peft_model: Any, lora: LoraSpec, base: Any, batches: Any) -> None:
    from lorasweep.lora import loftq

    loftq.finish(peft_model, lora, base)


add(
    Init(
        name="loftq",
        layers=frozenset({LINEAR, CONV1D, EMBEDDING}),  # an embedding is not rounded, so there is nothing to make up
        start="loftq quantises the base: the fresh adapter is near the base model, not equal to it",
        start_quantised=(
            "loftq makes up for a part of what quantising the base lost: the fresh adapter is nearer to the exact base"
        ),
        rounds_base=True,
        note="The base has to be quantised as LoftQ did (`lora.loftq_bits`); the merged form has that in it.",
        on_quantised=_other_rounding,
        needs_bitsandbytes=lambda lora: lora.loftq_bits == 4,
        in_peft=lambda lora: {"init_lora_weights": True},  # peft's own insists on a GPU
        finish=_finish_loftq,
    )
)


# --- eva -------------------------------------------------------------------------------------------------------------


def _eva_in_peft(lora: LoraSpec) -> dict[str, Any]:
    from lorasweep.lora.peft_names import EvaConfig

    return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=lora.eva_rho)}


def _finish_eva(peft_model: Any, lora: LoraSpec, base: Any, batches: Any) -> None:
    from lorasweep.lora import eva

    eva.finish(peft_model, batches())


add(
    Init(
        name="eva",
        rate=FARTHER,
        layers=frozenset({LINEAR, CONV1D}),
        sees=lambda lora: lora.eva_directions,
        sees_rule="r * eva_rho",
        dora=False,
        in_peft=_eva_in_peft,
        saved={"init_lora_weights": True, "eva_config": None},
        finish=_finish_eva,
    )
)
