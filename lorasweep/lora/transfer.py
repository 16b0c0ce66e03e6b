"""A trial that starts from another's saved adapter: the same update wherever the new adapter has the room for it.

Shapes: I inputs, O outputs, R rank of the new adapter, Q rank of what is to go into it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.tasks import task_state

NAMED = 4
"""How many of the tensors that were left out a note names."""

MAGNITUDE = ".lora_magnitude_vector"
"""Ends the name of DoRA's lengths of a layer's rows in a saved adapter."""

UNTRAINED = (".original_module.", ".base_layer.weight")
"""Parts of names that peft saves with biases or word vectors, and that are as in the base."""

PAIRS = {"A.weight": "B.weight", "embedding_A": "embedding_B"}
"""Ends of the names of A and B: of linear layers, of word vectors."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are taken for zero."""


def take_over(attached: adapter.Attached, folder: Path) -> str:
    """Set the adapter to the one saved in `folder` where shapes allow; return a note of what was taken and what not.

    A and B of a linear layer or of word vectors go over at any rank: the update stays the same where the new rank is
    large enough, and is else the nearest of that rank. DoRA begins with the lengths that the rows then have. Everything
    else has to have equal shape. Raises ConfigError without a saved adapter, and where DoRA's lengths find no place.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError([f"start_from: there is no saved adapter in {folder}; choose a trial that has one"])
    saved = {_known(n): w for n, w in load_file(file).items() if not any(part in n for part in UNTRAINED)}
    here = {_known(n): w for n, w in adapter.tensors(attached).items()}
    _check_magnitudes(saved, here, folder)
    scale = adapter.saved_scale(folder)
    taken: set[str] = set()
    with torch.no_grad():
        for name in sorted(saved.keys() & here.keys()):
            module, _, rest = name.partition(".lora_")
            ratio = 1.0
            if rest.startswith(("A.", "B.", "embedding_")):
                ratio = scale(module) / adapter.scale(attached, module)
            if rest in PAIRS and adapter.has_one_pair(attached, module):
                pair = (name, f"{module}.lora_{PAIRS[rest]}")
                _set_update(attached, pair, saved, here, ratio)
                taken |= {*pair}
            elif name not in taken and here[name].shape == saved[name].shape:
                here[name].copy_(saved[name] * (ratio if rest.startswith(("B.", "embedding_B")) else 1))
                taken.add(name)
        for name in sorted(n for n in here.keys() - saved.keys() if n.endswith(MAGNITUDE)):
            _renew_magnitude(attached, name.removesuffix(MAGNITUDE))
    left = sorted(saved.keys() - taken)
    names = f"; left out: {', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''}" if left else ""
    return f"took {len(taken)} of {len(saved)} tensors from {folder}{names}"


def problems(spec: TrialSpec, folder: Path) -> list[str]:
    """Return why a trial cannot start from the adapter in `folder`: one of them rounds its base, as LoftQ does, and the
    other does not round it so. The same update would then make another model.
    """
    if not (folder.parent / task_state.CONFIG).is_file():
        return []
    giver, taker = _rounding(task_state.settings(folder.parent)), _rounding(spec)
    if giver == taker:
        return []
    return [
        f"start_from: {folder} was trained on {giver or 'the base as it is'}, and this trial trains on "
        f"{taker or 'the base as it is'}; the update would not give the same model: keep lora.init_lora_weights and "
        "loftq's keys as they were"
    ]


def _rounding(spec: TrialSpec) -> str:
    """Return how LoftQ rounds an unquantised base, "" where nothing does. In later rounds the rank takes part."""
    lora = spec.lora
    if not lora.rounds_base or spec.model.quantization != "none":
        return ""
    ranks = f", r={lora.r}, rank_pattern={lora.rank_pattern or {}}, alpha={lora.alpha:g}" if lora.loftq_iter > 1 else ""
    return f"a base rounded by {lora.init.name} (loftq_bits={lora.loftq_bits}, loftq_iter={lora.loftq_iter}{ranks})"


def _check_magnitudes(saved: Mapping[str, Tensor], here: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ConfigError where the saved adapter is DoRA's and the new one adapts its layers without it."""
    adapted = {n.partition(".lora_")[0] for n in here}
    scaled = {n.removesuffix(MAGNITUDE) for n in saved if n.endswith(MAGNITUDE) and n not in here}
    lost = sorted(scaled & adapted)
    if lost:
        raise ConfigError(
            [
                f"start_from: {folder} was trained with DoRA, which scales whole rows of '{lost[0]}': no low-rank "
                "update can do that; set lora.use_dora=true, or choose a trial without it"
            ]
        )


def _renew_magnitude(attached: adapter.Attached, module: str) -> None:
    """Set DoRA's lengths to those that the rows of W + s B A have now, so that nothing is scaled."""
    layer = attached.peft_model.get_submodule(module)
    trained = layer.lora_magnitude_vector["default"]
    layer.lora_variant["default"].init(layer, adapter_name="default")  # puts a new one in its place
    trained.weight.copy_(layer.lora_magnitude_vector["default"].weight)
    layer.lora_magnitude_vector["default"] = trained


def _known(name: str) -> str:
    """Return one name for a bias of the base, whether its module is adapted or not."""
    return name.replace(".base_layer.bias", ".bias")


def _set_update(
    attached: adapter.Attached,
    pair: tuple[str, str],
    saved: Mapping[str, Tensor],
    here: Mapping[str, Tensor],
    ratio: float,
) -> None:
    """Set a layer's A and B so that they add to the base what the saved ones added; `ratio` is that of the scales."""
    a, b = pair
    A_RI, B_OR = here[a], here[b]
    A_QI, B_OQ = saved[a].to(A_RI), saved[b].to(B_OR) * ratio
    if a in attached.initial:  # PiSSA and OLoRA took their start out of the base weight: it belongs to the update
        A_QI, B_OQ = torch.cat([A_QI, attached.initial[a]]), torch.cat([B_OQ, attached.initial[b]], dim=1)
    if len(A_QI) > len(A_RI):
        A_QI, B_OQ = nearest(A_QI, B_OQ, len(A_RI))
    A_RI[: len(A_QI)] = A_QI
    B_OR.zero_()
    B_OR[:, : len(A_QI)] = B_OQ


def nearest(A_QI: Tensor, B_OQ: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of at most `rank` whose product is the nearest to B A (Eckart and Young), both equally large."""
    q_A, r_A = torch.linalg.qr(A_QI.double().T)
    q_B, r_B = torch.linalg.qr(B_OQ.double())
    U, S, Vt = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    rank = min(rank, int((S / S[0] > NEGLIGIBLE).sum()))  # A = B = 0 would never learn
    root = S[:rank].sqrt()
    return (root[:, None] * Vt[:rank] @ q_A.T).to(A_QI), (q_B @ U[:, :rank] * root).to(B_OQ)
