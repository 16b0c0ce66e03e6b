"""Disk space: the adapters that a study keeps by tracking.save_adapters, and what else its ended trials leave."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from lorasweep.config.spec import TrackSpec
from lorasweep.files import CHECKPOINT
from lorasweep.search.order import ENDED
from lorasweep.study import answer, repeats
from lorasweep.study.direction import upward
from lorasweep.study.study import Study


@dataclass(frozen=True)
class Item:
    """Something to remove."""

    path: Path
    size: int
    """Bytes."""
    why: str


def kept(study: Study, track: TrackSpec) -> set[int]:
    """Return the numbers of the trials whose adapters stay."""
    trials = [t for t in study.trials() if t.state in ENDED]
    if track.save_adapters == "all":
        return {t.number for t in trials}
    wanted = {
        t.user_attrs["start_from"] for t in study.trials() if t.state not in ENDED and "start_from" in t.user_attrs
    }
    best = study.best()
    if best is None or track.save_adapters == "none":
        return wanted
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values and repeats.is_searched(t)]
    if track.save_adapters == "top_k":
        done.sort(key=lambda t: (-upward(t.values[0], study.meta.maximize), t.number))
        return wanted | {best.number} | {t.number for t in done[: track.keep_top]}
    if track.save_adapters == "pareto":
        return wanted | {best.number} | {c.number for c in answer.answer(study).front}
    return wanted | {best.number}


def items(study: Study, track: TrackSpec) -> list[Item]:
    """Return what ended trials leave that nobody needs. Adapters stay as long as a trial waits or runs."""
    trials = study.trials()
    ended = [t.number for t in trials if t.state in ENDED]
    over = len(ended) == len(trials) or bool(study.not_begun() and not study.ready())
    stay = kept(study, track) if over else set(ended)
    out = []
    for number in ended:
        folder = study.trial_folder(number)
        found: list[tuple[Path, str]] = [(folder / CHECKPOINT, "checkpoint of an ended trial")]
        if number not in stay:
            found.append((folder / "adapter", f"adapter not kept (tracking.save_adapters={track.save_adapters})"))
        out += [Item(path, _size(path), why) for path, why in found if path.exists()]
    return out


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if not f.is_dir())


def remove(found: Sequence[Item]) -> None:
    """Remove the items; a link to a folder goes, what it points at stays."""
    for item in found:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


def tidy(study: Study, track: TrackSpec) -> None:
    """Remove, at a study's end, the adapters that tracking.save_adapters does not keep."""
    if track.save_adapters != "all":
        remove([i for i in items(study, track) if i.path.name == "adapter"])


def kept_tokens(outputs: Path) -> list[Item]:
    """Return the tokens that studies in `outputs` share. Who needs them makes them again; who reads them goes on."""
    from lorasweep.tasks import token_cache  # loads torch

    folder = outputs / token_cache.FOLDER
    return [Item(p, _size(p), "tokens, made again when needed") for p in sorted(folder.glob("*"))]
