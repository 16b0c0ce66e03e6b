"""The commands that work on results: report, predict, export, clean, sync."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasweep import console
from lorasweep.cli.find import PLACE, find, refuse_more
from lorasweep.cli.parser import Options
from lorasweep.config.overrides import key_of, without
from lorasweep.config.spec import TrackSpec
from lorasweep.errors import ConfigError
from lorasweep.report import html_page
from lorasweep.runner import cleanup
from lorasweep.serving import export as exporting
from lorasweep.serving import model_registry, winner
from lorasweep.serving import predict as predicting
from lorasweep.serving.predict import Given
from lorasweep.study.study import Study
from lorasweep.tracking import runs


def report(options: Options) -> int:
    """Write the report of a study as it stands, and log it to the study's MLflow run."""
    study, request = find(options.study, options.words)
    refuse_more(request, "report takes a study alone")
    for path in html_page.write(study):
        print(console.shown(path))
    problem = runs.send_report(study.folder)
    if problem:
        print(f"MLflow does not have it: {problem}")
    return 0


def predict(options: Options) -> int:
    """Print the answers to the texts or the file."""
    place = [text for text in options.texts if _says_where(text)]
    study, _ = find(options.study, place, trusted=options.trust_remote_code)
    given: list[Given] = [predicting.parsed(text) for text in options.texts if text not in place]
    given += predicting.read(Path(options.file)) if options.file else []
    if not given:
        raise ConfigError(["predict: give texts, or --file texts.jsonl, .csv or .txt"], "the command line")
    folder = study.trial_folder(winner.pick(study, options.trial))
    loaded = predicting.load(folder, trusted=study.trusted)
    for answer in predicting.answers(loaded, given):
        print(json.dumps(answer, ensure_ascii=False) if options.json else loaded.task.line(answer), flush=True)
    return 0


def _says_where(text: str) -> bool:
    return "=" in text and key_of(text) in PLACE


def export(options: Options) -> int:
    """Write the folder and print where it is."""
    study, request = find(options.study, options.words, trusted=options.trust_remote_code)
    refuse_more(request, "export takes a study alone")
    number = winner.pick(study, options.trial)
    name = f"export-{number}{'-merged' if options.merged else ''}"
    folder = Path(options.to).expanduser() if options.to else study.folder / name
    proof = exporting.export(study, number, folder, merged=options.merged)
    print(f"trial {number} of {study.meta.name}: {console.shown(folder)}")
    print(f"loaded by other tools, it answers {proof.rows} eval rows as the trial does", end="")
    print(f" (largest difference {proof.difference:.1g})")
    if proof.to_add:
        print(f"its head has no bias: to each number that it gives, {proof.to_add:.6g} is to be added (see its card)")
    return 0


def clean(options: Options) -> int:
    """Tell what the studies, all of ./outputs where none is named, could do without; remove it with --yes."""
    settings = [word for word in options.words if "=" in word]
    named = [word for word in options.words if "=" not in word]
    refused = [word for word in settings if not key_of(word).startswith(("tracking.", *PLACE))]
    if refused:
        raise ConfigError([f"{word}: clean takes studies, outputs=FOLDER and tracking.* keys" for word in refused])
    tracking, place = without(settings, PLACE), [word for word in settings if key_of(word) in PLACE]
    outputs = Path(next((word.partition("=")[2] for word in place if key_of(word) == "outputs"), "./outputs"))
    names = named or sorted(str(p.parent) for p in outputs.glob("*/study.json"))
    studies = [find(name, place)[0] for name in names]
    return run_clean(
        {s.meta.name: (s, track_of(s, tracking)) for s in studies},
        really=options.yes,
        outputs=None if named else outputs,
    )


def run_clean(studies: Mapping[str, tuple[Study, TrackSpec]], really: bool, outputs: Path | None = None) -> int:
    """Print what each study could do without, and what all in `outputs` share, in bytes; remove it where `really`."""
    found = []
    for name, (study, track) in studies.items():
        found += [(name, item) for item in cleanup.items(study, track)]
    found += [("(shared)", item) for item in cleanup.kept_tokens(outputs)] if outputs is not None else []
    if not found:
        print("nothing to remove")
        return 0
    rows = [[name, console.shown(item.path), f"{item.size:,}", item.why] for name, item in found]
    console.table("what can go", ["study", "path", "bytes", "why"], rows)
    if really:
        cleanup.remove([item for _, item in found])
    total = sum(item.size for _, item in found)
    print(f"{total:,} bytes freed" if really else f"{total:,} bytes; nothing was removed, --yes does it")
    return 0


def track_of(study: Study, overrides: Sequence[str]) -> TrackSpec:
    """Return the study's tracking settings, changed by overrides."""
    return study.first_spec(overrides).tracking


def sync(options: Options) -> int:
    """Send MLflow what it missed: points, runs, and the winner as a model where the study has ended.

    tracking.uri names another store, which is given everything. Returns 1 where MLflow did not take all of it.
    """
    study, request = find(options.study, options.words, trusted=options.trust_remote_code)
    wrong = [*without(request.overrides, ["tracking.uri"]), *request.launcher]
    if wrong:
        raise ConfigError([f"sync: takes a study and tracking.uri=..., got '{wrong[0]}'"])
    spec = study.first_spec(request.overrides)
    counts = runs.sync(study.folder, spec)
    print(counts)
    over = not study.queue.running() and not study.ready()
    told = model_registry.log_winner(study, spec) if over and not counts.failed else ""
    if told:
        print(told)
    return 1 if counts.failed or told.startswith(model_registry.NOT_LOGGED) else 0
