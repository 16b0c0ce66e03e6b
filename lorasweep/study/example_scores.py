"""What each example of the eval split adds to a trial's primary metric: <trial>/predictions.parquet, a row an example.

<trial>/evaluations/STEP.parquet has the same of each evaluation, row, score and of alone: the trial keeps the best.

Columns: row, loss, supervised, answer, and `score` and `of`, the two cells of which the metric's combination makes its
value (tasks/metric.py). The file's metadata name metric, combination and task.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasweep import tasks
from lorasweep.data.carve import KEPT_TOGETHER
from lorasweep.errors import ConfigError
from lorasweep.files import replacing
from lorasweep.tasks.metric import COMBINATIONS, Parts, Prediction, older_scale

if TYPE_CHECKING:
    from lorasweep.tasks.task import Task

NAME = "predictions.parquet"
TEST_NAME = "test_predictions.parquet"
"""The same of the test split, for the trial that the study chose."""
EVALUATIONS = "evaluations"
"""Folder of what each example adds to the metric at each evaluation, a file each."""
log = logging.getLogger(__name__)

LONGEST = 500
"""Characters of an answer that are kept."""


def write(
    folder: Path,
    task: "Task",
    metric: str,
    predictions: Sequence[Prediction],
    records: Sequence[Mapping[str, Any]],
    name: str = NAME,
) -> None:
    """Write predictions.parquet whole or not at all: row, loss, supervised, answer, the metric's two columns, and the
    group of each row where rows belong together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = {p["row"]: p for p in reversed(predictions)}
    rows = sorted(first)
    columns: dict[str, Any] = {
        "row": pa.array(rows, pa.int64()),
        "loss": pa.array([float(first[r]["loss"]) for r in rows]),
        "supervised": pa.array([int(first[r]["supervised"]) for r in rows]),
        "answer": pa.array([str(task.readable(records[r], first[r]))[:LONGEST] for r in rows]),
    }
    parts = task.metric(metric).parts(predictions)
    known = {int(r): i for i, r in enumerate(parts.rows)}
    for column, values in (("score", parts.first), ("of", parts.second)):
        cells = [values[known[r]] if r in known else None for r in rows]
        columns[column] = pa.array(cells, _cell_type(values))
    groups = [_group(records[r], r) for r in rows]
    if len(set(groups)) < len(groups):
        columns["group"] = pa.array(groups)
    facts = {"metric": metric, "kind": parts.kind, "task": task.name, "bounds": json.dumps(parts.bounds)}
    with replacing(folder / name, durable=True) as file:
        pq.write_table(pa.table(columns).replace_schema_metadata(facts), file)


def write_evaluation(folder: Path, step: int, parts: Parts) -> None:
    """Write what each example adds to the metric at one of a trial's evaluations, among which it keeps the best."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not len(parts):
        return
    columns = {"row": pa.array(parts.rows, pa.int64())}
    for column, values in (("score", parts.first), ("of", parts.second)):
        columns[column] = pa.array(list(values), _cell_type(values))
    facts = {"metric": parts.metric, "kind": parts.kind, "bounds": json.dumps(parts.bounds)}
    (folder / EVALUATIONS).mkdir(exist_ok=True)
    with replacing(folder / EVALUATIONS / f"{step}.parquet") as file:
        pq.write_table(pa.table(columns).replace_schema_metadata(facts), file)


def _cell_type(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.list_(pa.float64()) if any(isinstance(v, Sequence) for v in values) else pa.float64()


def _group(record: Mapping[str, Any], row: int) -> str:
    """Return a digest of what keeps a record together with others; of its row where nothing does."""
    kept = next((record[name] for name in KEPT_TOGETHER if name in record), row)
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]


def copy_test_scores(folder: Path, place: Path) -> None:
    """Write what each test example adds to the metric to another folder, without the answers; nothing where there is
    none.
    """
    import pyarrow.parquet as pq

    if (folder / TEST_NAME).is_file():
        table = pq.read_table(folder / TEST_NAME)
        pq.write_table(table.select([n for n in table.column_names if n != "answer"]), place / TEST_NAME)


def read(folder: Path, name: str = NAME) -> Parts | None:
    """Return what predictions.parquet says of the primary metric; None where there is none, where nobody here knows its
    combination or, with a warning, where it is damaged.
    """
    import pyarrow.parquet as pq

    path = folder / name
    if not path.is_file():
        return None
    try:
        return _parts(pq.read_table(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are ValueError and KeyError
        log.warning("%s cannot be read (%s): its trial has no interval", path, str(error).splitlines()[0][:200])
        return None


def read_evaluations(folder: Path, steps: Sequence[int]) -> list[Parts]:
    """Return what the evaluations after these steps say of the primary metric, as far as they are there."""
    own = read(folder)
    names = [f"{EVALUATIONS}/{step}.parquet" for step in steps]
    found = [parts for name in names if (parts := read(folder, name)) is not None] if own is not None else []
    same = [parts for parts in found if own is not None and np.array_equal(parts.rows, own.rows)]
    return [replace(parts, groups=own.groups) for parts in same] if own is not None else []


def _parts(table: Any) -> Parts | None:
    import pyarrow.compute as pc

    facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    if not _is_known(facts.get("kind", ""), facts.get("task", "")):
        return None
    table = table.filter(pc.is_valid(table["score"]))
    if not table.num_rows:  # a metric that has no value a row
        return None
    rows = table["row"].to_numpy()
    first, second = (_cells(table[name]) for name in ("score", "of"))
    bounds = tuple(json.loads(facts["bounds"])) if "bounds" in facts else older_scale(facts["metric"])[0]
    groups = table["group"].to_numpy(zero_copy_only=False) if "group" in table.column_names else None
    return Parts(facts["metric"], facts["kind"], rows, first, second, bounds, groups)


def _is_known(kind: str, task: str) -> bool:
    """Return whether a combination is there, once an outside package that brings the task or the metric is loaded."""
    if kind and kind not in COMBINATIONS and task:
        try:
            tasks.load_all(task)
        except ConfigError:
            return False
    return kind in COMBINATIONS


def _cells(column: Any) -> Any:
    import pyarrow.types as kinds

    return column.to_pylist() if kinds.is_list(column.type) else column.to_numpy()
