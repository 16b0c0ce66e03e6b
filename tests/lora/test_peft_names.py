"""peft is imported without bitsandbytes, and still knows its layers where a base has them."""

import subprocess
import sys

import pytest

pytest.importorskip("bitsandbytes")

SCRIPT = """
import sys
import torch
from lorasweep.lora.peft_names import LoraConfig, get_peft_model

def adapted(layer):
    model = torch.nn.Sequential(layer)
    return type(get_peft_model(model, LoraConfig(target_modules=["0"])).base_model.model[0])

adapted(torch.nn.Linear(4, 4))
assert not [name for name in sys.modules if name.startswith("bitsandbytes")]
assert sys.modules.get("torch._inductor.lowering") is None
import bitsandbytes
from peft.tuners.lora.bnb import Linear4bit
model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64))
model.is_loaded_in_4bit = True
assert type(get_peft_model(model, LoraConfig(target_modules=["0"])).base_model.model[0]) is Linear4bit
import peft.helpers
assert peft.helpers.bnb.functional is bitsandbytes.functional
"""


@pytest.mark.integration
def test_peft_loads_bitsandbytes_only_for_a_base_that_has_its_layers() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
