"""The names of peft that we use, imported without bitsandbytes, which takes a quarter of peft's import.

peft imports it where it is installed, at once and again for each adapter, to tell its layers from others. A model has
such layers only where something has imported bitsandbytes already: until then peft is spared the question.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# peft asks every model by a name that transformers renames: nothing that a user could change, and MLflow's thread would
# say it whatever is left out for a while elsewhere
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

BITSANDBYTES = "bitsandbytes"


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes look as if it were not installed, unless it is imported already."""
    if BITSANDBYTES in sys.modules:
        yield
        return
    sys.modules[BITSANDBYTES] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[BITSANDBYTES]


class _WhenUsed:
    """Stands for bitsandbytes where peft holds on to it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(BITSANDBYTES), name)


def _only_if_loaded(question: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: BITSANDBYTES in sys.modules and question()


with _without_bitsandbytes():
    import peft.helpers
    import peft.import_utils
    import peft.tuners.lora.model
    from peft import (
        EvaConfig,
        LoraConfig,
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        initialize_lora_eva_weights,
        load_peft_weights,
    )
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from peft.utils.other import get_pattern_key
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

for _name in ("is_bnb_available", "is_bnb_4bit_available"):
    _question = getattr(peft.import_utils, _name)
    _question.cache_clear()  # it has just been answered with no
    setattr(peft.tuners.lora.model, _name, _only_if_loaded(_question))
if BITSANDBYTES not in sys.modules:
    peft.helpers.bnb = _WhenUsed()  # type: ignore[assignment]

__all__ = [
    "DUMMY_TARGET_MODULES",
    "EvaConfig",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "PeftModel",
    "check_target_module_exists",
    "convert_peft_config_for_transformers",
    "get_pattern_key",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "load_peft_weights",
]
