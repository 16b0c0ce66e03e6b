"""What is measured of a trial: each number with its title, its unit and where it goes.

TrialResult (study/result.py) has an attribute of each name; whoever shows or keeps numbers goes by this.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number of a trial."""

    title: str
    unit: str
    is_cost: bool = False
    """Less is better: reports show quality against it, and a study may make it small too (search.objectives)."""
    in_mlflow: bool = False
    """The trial's MLflow run has it as a metric."""
    in_storage: bool = False
    """The study's storage keeps it, for those who do not reach the trial's folder."""
    phrase: str = ""
    """A cost in a line of text."""


MEASURES = {
    "trainable": Measure("trainable parameters", "count", is_cost=True, in_storage=True, phrase="{:,.0f} trainable"),
    "adapter_mb": Measure("adapter size", "MB", is_cost=True, in_mlflow=True, in_storage=True, phrase="{:.2f} MB"),
    "train_s": Measure(
        "training time", "device s", is_cost=True, in_mlflow=True, in_storage=True, phrase="{:.2f} s training"
    ),
    "peak_gib": Measure("peak memory", "GiB", is_cost=True, in_mlflow=True, in_storage=True, phrase="{:.2f} GiB"),
    "worker_peak_gib": Measure("highest memory of its worker", "GiB", in_mlflow=True),
    "steps": Measure("optimiser steps", "count", in_storage=True),
    "learning_rate": Measure("highest learning rate", "per step", in_storage=True),
    "eval_s": Measure("evaluation time", "device s", in_mlflow=True, in_storage=True),
    "device_s": Measure("device time", "device s", in_storage=True),
    "wall_s": Measure("time from its begin to its end", "s", in_mlflow=True),
    "prefix_saved_s": Measure("time spared by kept frozen layers", "device s"),
    "packing_saved_s": Measure("training time spared by shared passes", "device s", in_mlflow=True),
    "tokens_per_s": Measure("training speed", "tokens/s"),
    "flops_per_s": Measure("matmul speed while training", "FLOP/s", in_mlflow=True),
    "matmul_share": Measure("share of the device's matmul peak", "0 to 1", in_mlflow=True),
    "energy_j": Measure("energy of training", "J", in_mlflow=True),
}

COSTS = {name: measure for name, measure in MEASURES.items() if measure.is_cost}
