"""What peft warns of though it is as we want it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out() -> Iterator[None]:
    """Leave these notices out."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*(changes the base weights|with eva init|Could not find a config|is_gradient_checkpointing"
            r"|LoRA tensor\(s\) have invalid shape"  # a bias of B has one dimension
            r"|fan_in_fan_out is set to|Setting .save_embedding_layers"  # peft sets by itself what is right
            r"|tie_word_embeddings|no longer tied).*",  # peft_config.notes says it
        )
        yield
