"""A package of somebody else's, as pip would have installed it: code, conf files, entry points."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from lorasweep.config import registry


def install(
    monkeypatch: pytest.MonkeyPatch,
    site: Path,
    name: str,
    code: str,
    points: Mapping[str, Mapping[str, str]],
    conf: Mapping[str, str] | None = None,
) -> None:
    """Write a package into `site` and put that on the path; `points` is group -> name -> value.

    What it registers under those names goes with the test.
    """
    package, about = site / name, site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    package.mkdir()
    (package / "__init__.py").write_text(code, encoding="utf8")
    for path, text in (conf or {}).items():
        file = package / "conf" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf8")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    for entries in (registry.TASKS, registry.READERS, registry.METRICS):
        for entry in points.get(entries.group, ()):
            monkeypatch.setitem(entries._entries, entry, None)
            del entries._entries[entry]
    monkeypatch.syspath_prepend(site)
