"""What `check` says of a trial."""

import pytest
from support.adapters import prepared

from lorasweep.runner import check

T5 = ("task_type=seq_2_seq_lm", "lora.target_modules=qv")


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ((), "0 to 1 of decoder.block, 0 to 1 of encoder.block"),
        (("lora.layers_to_transform=1",), "1 of decoder.block, 1 of encoder.block"),
        (
            ("lora.layers_to_transform=1", "lora.layers_pattern=layer"),
            "1 of decoder.block.0.layer, 1 of decoder.block.1.layer",
        ),
    ],
)
def test_check_names_the_layers_that_a_number_takes(tiny_t5, capsys, more, layers):
    spec, work, _ = prepared(tiny_t5, *T5, *more)
    check.show(spec, work)
    adapted = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adapted:"))
    parts = sorted(adapted.partition("; layers ")[2].split(", "))
    assert parts == sorted(layers.split(", "))
