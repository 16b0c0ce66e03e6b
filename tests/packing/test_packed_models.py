"""Packed trials of real models end as they would alone: slots of other ranks, targets, dropout and starts."""

from collections.abc import Sequence

import pytest
import torch
from support.parity import EXACT, Seen, close, run, trainer

from lorasweep.config import compose
from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.memory import out_of_memory
from lorasweep.training import engine, workload

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("always_together")]

SHORT = ["data.max_train_samples=100", "data.max_eval_samples=4", "train.batch_size=4", "train.learning_rate=1e-3"]

MODELS = {
    "minilm": (
        ["task_type=seq_cls", "model=minilm", "data.max_tokens=48"],
        [
            ("lora.r=8", "lora.lora_dropout=0.1", "lora.bias=all"),
            ("lora.r=4", "lora.lora_alpha=3", "lora.target_modules=[query,value]", "train.seed=5"),
            ("lora.r=3", "lora.target_modules=mlp", "lora.lora_dropout=0.3", "train.seed=2", "train.batch_size=3"),
            ("lora.r=5", "lora.init_lora_weights=pissa", "lora.modules_to_save=[layer.5.output.dense]", "train.seed=3"),
            ("lora.r=6", "lora.init_lora_weights=loftq", "lora.loftq_bits=8", "lora.lora_dropout=0.2", "train.seed=4"),
        ],
    ),
    "smollm2_135m": (
        ["task_type=causal_lm", "model=smollm2_135m", "data.max_tokens=32"],
        [
            ("lora.r=8", "lora.lora_dropout=0.1", "train.batch_size=2"),
            ("lora.r=4", "lora.target_modules=[q_proj,v_proj]", "train.seed=5", "train.batch_size=2"),
            ("lora.r=3", "lora.target_modules=mlp", "lora.lora_dropout=0.3", "train.seed=2", "train.batch_size=1"),
            ("lora.r=4", "lora.init_lora_weights=olora", "lora.target_modules=[q_proj]", "train.batch_size=1"),
        ],
    ),
}
"""What the trials share, and what each has of its own."""


def both_ways(name: str, *more: str) -> tuple[list[TrialSpec], dict[int, Seen], dict[int, Seen]]:
    """Return the trials, and what each showed packed and alone."""
    shared, own = MODELS[name]
    try:
        specs = [compose.compose_trial([*shared, *SHORT, *one, *more]) for one in own]
        work = workload.workload(specs[0])
    except ConfigError as error:
        pytest.skip(str(error))
    jobs: Sequence[engine.Job] = [engine.Job(i, spec) for i, spec in enumerate(specs)]
    made = trainer(specs[0], work)
    packed = run(made, jobs, len(jobs))
    assert made.limits.most == out_of_memory.MOST_SLOTS, "they did not share their passes"
    return specs, packed, run(trainer(specs[0], work), jobs, 1)


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_in_double_precision_are_the_same(name, double):
    """Losses, the gradient of every tensor at every step, metrics, and the weights at the end."""
    specs, packed, alone = both_ways(name, "train.max_steps=10", "train.eval_every=10")
    for i in range(len(specs)):
        assert alone[i].steps == 10 and all(g.dtype == torch.float64 for g in alone[i].gradients[0].values())
        close(packed[i], alone[i], EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_differs_by_rounding_only(name):
    """At the same weights: the first step, from a random B, for with B = 0 the gradients of A are 0."""
    specs, packed, alone = both_ways(name, "train.max_steps=1", "lora.init_lora_weights=false")
    for i in range(len(specs)):
        assert packed[i].losses == pytest.approx(alone[i].losses, rel=1e-5)
        assert packed[i].gradients[0].keys() == alone[i].gradients[0].keys()
        for n, slope in alone[i].gradients[0].items():
            gap = (packed[i].gradients[0][n] - slope).norm()
            assert gap <= 1e-5 * slope.norm() + 1e-7, f"{n}: {gap} of {slope.norm()}"
            assert slope.norm() > 0 or "lora_" not in n, f"{n}: no gradient, nothing was compared"
