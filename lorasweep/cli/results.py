"""The commands that work on results: predict, export, clean."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep import console
from lorasweep.config.spec import TrackSpec
from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.runner import cleanup
from lorasweep.serving import export, predict, winner
from lorasweep.serving.predict import Given
from lorasweep.study.study import Study


def run_clean(studies: Mapping[str, tuple[Study, TrackSpec]], really: bool, outputs: Path | None = None) -> int:
    """Print what each study could do without, and what all in `outputs` share, in bytes; remove it where `really`."""
    found = [(name, item) for name, (study, track) in studies.items() for item in cleanup.items(study, track)]
    found += [("(shared)", item) for item in cleanup.kept_tokens(outputs)] if outputs is not None else []
    rows: list[list[str]] = [[name, console.shown(i.path), f"{i.size:,}", i.why] for name, i in found]
    total = sum(i.size for _, i in found)
    if not found:
        print("nothing to remove")
        return 0
    console.table("what can go", ["study", "path", "bytes", "why"], rows)
    if really:
        cleanup.remove([i for _, i in found])
    print(f"{total:,} bytes freed" if really else f"{total:,} bytes; nothing was removed, --yes does it")
    return 0


def track_of(study: Study, overrides: Sequence[str]) -> TrackSpec:
    """Return the study's tracking settings, changed by overrides."""
    spec: Any = study.spec([*study.space.fixed, *overrides])
    return spec.tracking


EXPORT_FLAGS = ("--trial", "--merged", "--to")


def run_export(study: Study, words: Sequence[str]) -> int:
    """Write the folder and print where it is."""
    number, rest = trial_option(words)
    to, rest = option(rest, "--to")
    wrong = [w for w in rest if w != "--merged"]
    if wrong:
        raise ConfigError(
            [f"{wrong[0]}: export has no such flag{did_you_mean(wrong[0], EXPORT_FLAGS)}"], "the command line"
        )
    number, merged = winner.pick(study, number), "--merged" in rest
    name = f"export-{number}{'-merged' if merged else ''}"
    folder = Path(to).expanduser() if to else study.folder / name
    export.export(study, number, folder, merged=merged)
    print(f"trial {number} of {study.meta.name}: {console.shown(folder)}")
    return 0


PREDICT_FLAGS = ("--file", "--trial", "--json")


def run_predict(study: Study, words: Sequence[str]) -> int:
    """Print the answers to the texts or the file that the words name."""
    number, rest = trial_option(words)
    file, rest = option(rest, "--file")
    texts = [w for w in rest if w != "--json"]
    flags = [w for w in texts if w.startswith("--")]
    if flags:
        raise ConfigError([f"{flags[0]}: no such flag{did_you_mean(flags[0], PREDICT_FLAGS)}"], "the command line")
    given: list[Given] = [predict.parsed(t) for t in texts] + (predict.read(Path(file)) if file else [])
    if not given:
        raise ConfigError(["predict: give texts, or --file texts.jsonl, .csv or .txt"], "the command line")
    folder = study.trial_folder(winner.pick(study, number))
    for answer in predict.answers(predict.load(folder), given):
        print(json.dumps(answer, ensure_ascii=False) if "--json" in rest else predict.line(answer), flush=True)
    return 0


def trial_option(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return what `--trial N` says, None without it, and the other words. Raises ConfigError where N is no number."""
    value, rest = option(words, "--trial")
    if value is not None and not value.isdigit():
        raise ConfigError([f"--trial: must be a trial's number, got '{value}'"], "the command line")
    return None if value is None else int(value), rest


def option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the word after the flag `name`, None without it, and the other words."""
    rest = list(words)
    if name not in rest:
        return None, rest
    at = rest.index(name)
    if at + 1 == len(rest):
        raise ConfigError([f"{name}: a value must follow"], "the command line")
    value = rest[at + 1]
    return value, rest[:at] + rest[at + 2 :]
