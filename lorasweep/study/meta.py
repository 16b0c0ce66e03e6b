"""What a study is, apart from its trials: study.json, and the entries of its queue."""

import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.config import fields as field_rules
from lorasweep.config.spec import SearchSpec, known_keys
from lorasweep.errors import ConfigError
from lorasweep.files import read_json, replace_file
from lorasweep.search.dimension import Value
from lorasweep.tasks.metric import older_scale

STUDY = "study.json"
JOURNAL = "journal.log"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyMeta:
    """What study.json holds, and the storage too."""

    name: str
    swept: list[str]
    """Keys that vary."""
    overrides: list[str]
    """What the study was started with."""
    metric: str
    maximize: bool
    created: str
    question: str = ""
    space: dict[str, Any] = field(default_factory=dict)
    """Space.describe()."""
    search: dict[str, Any] = field(default_factory=dict)
    """SearchSpec as a dict."""
    outputs: str = "./outputs"
    launcher: list[str] = field(default_factory=list)
    """Overrides of Hydra's own keys, for `resume`."""
    storage: str | None = None
    """The database, without its password; None is the journal file beside study.json."""
    mlflow_parent: str | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    """For each data set: overrides of a trial that reads it, its fingerprint, and path, size and time of its files."""
    unit: str = ""
    """What the metric is measured in; "" in studies that did not write it down."""
    low: float | None = None
    """Lowest value that the metric can have, None where there is none; `high` likewise."""
    high: float | None = None

    expected_s: float | None = None
    """Seconds that its trials were expected to take, before it began; None where no step was timed."""

    @property
    def place(self) -> str:
        """The study's folder as a person types it."""
        return f"{self.outputs.rstrip('/')}/{self.name}".removeprefix("./")

    @property
    def shown_unit(self) -> str:
        return self.unit or older_scale(self.metric)[1]

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value that the metric can have."""
        if not self.unit:
            return older_scale(self.metric)[0]
        return (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)


@dataclass(frozen=True)
class Entry:
    """A trial for the queue. Without overrides its point is drawn when it is claimed; `given` is fixed before."""

    overrides: list[str] | None = None
    given: dict[str, Value] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    """Overrides that lie outside the space."""
    start_from: int | None = None
    retry_of: int | None = None
    """The failed trial that it does again."""
    repeat_of: int | None = None
    """The trial that it runs again with another seed."""
    repeat: int = 0
    """Which of its repeats, from 1."""
    baseline: str = ""
    """Which baseline it is (search.baselines), if any; no trial of the search."""
    added: bool = False
    """By hand, while the study ran: it goes first."""
    may_be_pruned: bool = False
    """Of an added trial: whether the pruner may end it."""


def new_name(swept: Sequence[str]) -> str:
    """Return a study's name from the time and what it sweeps."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([time.strftime("%Y%m%d-%H%M%S"), *swept])[:100])


def write_meta(folder: Path, meta: StudyMeta) -> None:
    """Write study.json."""
    replace_file(folder / STUDY, json.dumps(asdict(meta), indent=1), durable=True)


def find_meta(folder: Path) -> StudyMeta | None:
    """Return what study.json holds, or where that is damaged its queue; None where neither has anything."""
    values = read_json(folder / STUDY)
    if values is None and (folder / STUDY).exists():
        values = _in_journal(folder / JOURNAL)
        if values is not None:
            log.warning("%s is damaged; the study's queue has the same", folder / STUDY)
    try:
        return None if values is None else StudyMeta(**values)
    except TypeError:  # JSON, but no study's
        return None


def _in_journal(path: Path) -> dict[str, Any] | None:
    """Return what a journal remembers of its study, as of its last change."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed([line for line in lines if b'"meta"' in line]):
        try:
            return json.loads(line)["user_attr"]["meta"]
        except (ValueError, KeyError, TypeError):
            continue
    return None


def next_name(name: str) -> str:
    """Return the name to try after one that is taken: NAME_2, NAME_3, ..."""
    stem, sign, number = name.rpartition("_")
    return f"{stem}_{int(number) + 1}" if sign and number.isdigit() else f"{name}_2"


def read_meta(folder: Path) -> StudyMeta:
    """Return what study.json holds. Raises ConfigError if there is none."""
    found = find_meta(folder)
    if found is None:
        if (folder / STUDY).exists():
            way_out = "where a database keeps its queue, name that: postgresql://... study=NAME"
            raise ConfigError([f"{folder}: {STUDY} is damaged; write it back from a backup, or {way_out}"])
        half = " (its making was cut short: delete the folder)" if (folder / JOURNAL).exists() else ""
        raise ConfigError([f"{folder}: no study here, it has no {STUDY}{half}"])
    return found


def search_spec(values: Mapping[str, Any]) -> SearchSpec:
    problems: list[str] = []
    found = field_rules.section(SearchSpec, values, "search", known_keys(), problems)
    if problems:
        raise ConfigError(problems)
    return found
