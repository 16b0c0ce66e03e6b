"""Which rows are evaluated together, and which stand for all."""

import random

import pytest

from lorasweep import evaluate
from lorasweep.tasks import Example


def examples(count: int) -> list[Example]:
    lengths = random.Random(0)
    return [Example(row, {"input_ids": [1] * lengths.randint(1, 40)}, target=0, supervised=1) for row in range(count)]


@pytest.mark.parametrize(("count", "size", "wanted"), [(600, 32, 128), (1000, 8, 128), (100, 32, 128), (90, 64, 50)])
def test_some_rows_are_whole_batches_of_all_lengths(count, size, wanted):
    """What a batch gives may depend on who is in it."""
    all_of_them = examples(count)
    rows = evaluate.some_rows(all_of_them, size, wanted)
    assert min(count, wanted // 2) <= len(rows) <= max(count if count <= wanted else wanted, size)
    whole = [[e.row for e in batch] for batch in evaluate.batches(all_of_them, size)]
    some = [[e.row for e in batch] for batch in evaluate.batches([e for e in all_of_them if e.row in rows], size)]
    assert all(batch in whole for batch in some)
    assert some[0] == whole[0]
    shortest = min(len(e) for e in all_of_them if e.row in rows)
    assert shortest <= 20, "the longest alone would not stand for all"
