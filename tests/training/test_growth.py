"""A long study takes no more memory than a short one: what the 2nd trial needs, the 50th needs too."""

import gc

import pytest
import torch
from support.parity import spec_of, trainer, workload_of

from lorasweep.training import engine

pytestmark = pytest.mark.usefixtures("always_together")

KINDS = (
    ("lora.bias=all", "lora.lora_dropout=0.2"),
    ("lora.init_lora_weights=pissa", "lora.r=6"),
    ("lora.target_modules=attention", "lora.modules_to_save=[layer.1.output.dense]"),
    ("lora.use_dora=true", "train.batch_size=7", "train.micro_batch_size=3"),
)
"""Four that meet in four slots again and again: each trial has the neighbours of the fourth before it."""


def alive() -> tuple[int, int]:
    """Return how many tensors are alive, and the bytes that they hold."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return len(tensors), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_fiftieth_trial_holds_as_much_memory_as_the_second(tiny_bert):
    """52 trials, so that the four slots are as full at the end of the 50th as at that of the 2nd."""
    specs = [spec_of("seq_cls", tiny_bert, *kind, "train.max_steps=2") for kind in KINDS]
    made = trainer(specs[0], workload_of("seq_cls", tiny_bert))
    made.width, jobs, ended, held = len(KINDS), [engine.Job(i, specs[i % 4]) for i in range(52)], 0, {}
    for event in made.run(lambda: jobs.pop(0) if jobs else None):
        if isinstance(event, engine.TrialEnded):
            ended += 1
            assert event.state == "COMPLETE"
            if ended in (2, 26, 50):
                assert len(made.slots) == 3  # the first of the four has just left
                del event
                held[ended] = alive()
    assert ended == 52
    assert held[50] == held[26] == held[2]
