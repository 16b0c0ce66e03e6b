"""What a name in the settings stands for: tasks, readers and metrics, ours and those of outside packages; samplers,
pruners and initialisations.

Names are known without importing anybody's code: from the files in conf/ and from entry points. What a name stands for
is imported when it is first asked for.
"""

import importlib
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from lorasweep.errors import ConfigError

T = TypeVar("T")

GROUPS = ("lorasweep.tasks", "lorasweep.readers", "lorasweep.metrics")
"""Groups of entry points that an outside package may fill."""


class Registry(Collection[str], Generic[T]):
    """Entries by name. As a collection it holds the names."""

    def __init__(self, group: str, key: str = "", module: str = "") -> None:
        """`key` is the config key whose value names an entry; `module` the one that registers it when it is imported,
        `{}` the name of its conf file.
        """
        self.group, self.key, self.module = group, key, module
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register an entry; a module that is imported again takes its own place."""
        self._entries[name] = entry

    def get(self, name: str, fits: Callable[[Any], bool] = lambda _: True) -> T:
        """Return what a name stands for. Raises ConfigError for an unknown name, and for an outside package that cannot
        be loaded or whose entry does not fit.
        """
        stem = self._from_conf().get(name)
        outside = next((p for p in _entry_points(self.group) if p.name == name), None)
        if name not in self._entries and stem is not None:
            importlib.import_module(self.module.format(stem))
        if name not in self._entries and outside is not None:
            self._entries.setdefault(name, self._loaded(outside))  # it may register itself
        if name not in self._entries:
            raise ConfigError([f"{self.key}: must be one of {', '.join(self)}, got '{name}'"])
        if not fits(self._entries[name]):
            raise ConfigError([f"{self.key}: '{name}' is not what {self.group} takes: {self._entries[name]!r:.200}"])
        return self._entries[name]

    def _loaded(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except Exception as error:  # whatever an outside module does when it is imported
            owner = f"{point.dist.name} {point.dist.version}" if point.dist else "a package"
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                [
                    f"{self.key or self.group}: {point.name} comes from {owner} ({point.value}), which cannot be "
                    f"loaded ({reason}); mend or uninstall it"
                ]
            ) from error

    def _from_conf(self) -> dict[str, str]:
        """Return name -> conf file."""
        return _names_in_conf(data_folder("conf"), self.key) if self.key else {}

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._from_conf() or name in self._outside()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._from_conf(), *self._entries, *self._outside()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _outside(self) -> list[str]:
        return [point.name for point in _entry_points(self.group)]


TASKS: Registry[Any] = Registry("lorasweep.tasks", "task_type.name", "lorasweep.tasks.{}")
READERS: Registry[Any] = Registry("lorasweep.readers", "data.source", "lorasweep.data.readers")
METRICS: Registry[Any] = Registry("lorasweep.metrics")
"""Metrics of outside packages, named TASK.metric: a task's own are in its file."""


class Listed(Collection[str], Generic[T]):
    """Entries that stand in one module, by name and in its order.

    The settings come before what their values name: the module is imported when a value is first asked for.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._entries: dict[str, tuple[Callable[[object], bool], T]] = {}

    def add(self, name: str, entry: T, takes: Callable[[object], bool] | None = None) -> None:
        """Register an entry; `takes` tells the values that it stands for, by default its name."""
        self._entries[name] = takes or partial(operator.eq, name), entry

    def get(self, value: object) -> T:
        """Return what a value stands for. Raises KeyError where it stands for nothing."""
        for takes, entry in self._loaded().values():
            if takes(value):
                return entry
        raise KeyError(value)

    def named(self, name: str) -> T:
        """Return the entry of this name, which may be no value itself: `pissa_niter_N`."""
        return self._loaded()[name][1]

    def _loaded(self) -> dict[str, tuple[Callable[[object], bool], T]]:
        importlib.import_module(self.module)
        return self._entries

    def __contains__(self, value: object) -> bool:
        return any(takes(value) for takes, _ in self._loaded().values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())


SAMPLERS: Listed[Any] = Listed("lorasweep.search.samplers")
PRUNERS: Listed[Any] = Listed("lorasweep.search.pruners")
INITS: Listed[Any] = Listed("lorasweep.lora.inits")


# --- where names stand -----------------------------------------------------------------------------------------------


@cache
def data_folder(name: str) -> Path:
    """Return the folder `conf` or `sweeps`: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here.parent / name, here / "_data" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"lorasweep is incomplete: no folder {name} beside {here}")


@cache
def _names_in_conf(folder: Path, key: str) -> dict[str, str]:
    """Return value -> file name without suffix, for each file of a group that sets `key`."""
    group, _, name = key.partition(".")
    names = {}
    for path in sorted((folder / group).glob("*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf8"))
        value = tree.get(group, tree).get(name)  # a file for the whole tree names its group
        if value is not None:
            names[value] = path.stem
    return names


def outside_conf() -> list[Path]:
    """Return the folders `conf` of the packages that have entry points of ours."""
    points = chain.from_iterable(map(_entry_points, GROUPS))
    names = {point.module.partition(".")[0] for point in points}
    packages = [spec for spec in map(find_spec, sorted(names)) if spec is not None]
    places = chain.from_iterable(spec.submodule_search_locations or () for spec in packages)
    return [conf for conf in (Path(place) / "conf" for place in places) if conf.is_dir()]


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return _entry_points_on(group, tuple(sys.path))


@lru_cache(maxsize=16)
def _entry_points_on(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group; looking through all distributions takes a tenth of a second."""
    return tuple(entry_points(group=group))
