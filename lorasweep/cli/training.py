"""The commands that train, or tell what would happen: one trial, a grid, a study; check."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasweep.runner.plan import Look, Plan
    from lorasweep.runner.request import Request

from lorasweep.cli.commands import COMMANDS, HYDRA_FLAGS, no_command
from lorasweep.cli.parser import Options
from lorasweep.errors import ConfigError, did_you_mean


def train(options: Options) -> int:
    """Run one trial here, or a study through Hydra, whose launcher starts the workers."""
    _refuse_commands(options.words)
    from lorasweep.runner import hydra_sweeper
    from lorasweep.runner.request import Request

    request = Request.of(options.words, options.sweep)
    if any(getattr(options, flag.strip("-").replace("-", "_")) for flag in HYDRA_FLAGS):
        return hydra_sweeper.call_hydra([*_hydra_words(options), *request.overrides, *request.launcher])
    from lorasweep.runner.worker_process import Workers

    through_hydra = options.multirun or options.sweep is not None
    with Workers() as workers:
        planned = _planned(request, workers.look)
        from lorasweep.runner.launch import run_study

        return hydra_sweeper.launched(
            lambda launch: run_study(planned, launch, workers.begin),
            planned.meta,
            planned.folder,
            workers,
            through_hydra=through_hydra,
        )


def _planned(request: "Request", look: "Look") -> "Plan":
    """Say at once what is going to be looked at, and return the plan."""
    from lorasweep.runner.points import points

    asked = points(request)
    varying = f" and every point of {', '.join(asked.space.keys)}" if asked.space.keys else ""
    print(f"checking model, data{varying}", flush=True)
    from lorasweep.runner import plan

    return plan.plan(request, asked, look)


def _refuse_commands(words: list[str]) -> None:
    """Raise ConfigError for words that are no settings: they may be meant as commands."""
    problems = []
    setting, strays = "", [""]
    for word in words:
        if "=" in word or word.startswith("~"):
            setting, strays = word, []
        elif word in COMMANDS:
            problems.append(f"{word}: a command comes first, then its words and flags; see: {word} --help")
        elif setting and not Path(word).expanduser().exists() and not _near(word):
            strays.append(word)
            if len(strays) == 1:
                rest = words[words.index(setting) + 1 :]
                values = [
                    *filter(None, [setting.partition("=")[2].strip(",")]),
                    *takewhile(lambda w: "=" not in w, rest),
                ]
                whole = f"{setting.partition('=')[0]}={','.join(v.strip(',') for v in values)}"
                problems.append(f"{word}: no such command; if it belongs to '{setting}', write {whole}, without spaces")
        else:
            problems.append(no_command(word))
    if problems:
        raise ConfigError(problems, "the command line")


def _near(word: str) -> bool:
    """Return whether a word looks like a command that is misspelt."""
    return "did you mean" in did_you_mean(word, list(COMMANDS))


def _hydra_words(options: Options) -> list[str]:
    """Return Hydra's own flags as they were given."""
    words: list[str] = []
    for flag in HYDRA_FLAGS:
        value = getattr(options, flag.strip("-").replace("-", "_"))
        if value:
            words += [flag] if value is True else [flag, value]
    return words


def _named(point: Mapping[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """Return a point's values of the swept keys; of a baseline, its name in the place of the first."""
    if "baseline" not in point:
        return dict(point)
    return {swept[0]: point["baseline"]} if swept else {}


def check(options: Options) -> int:
    """Print what a trial or a grid would do, or the trials at the ends of the space that a sampler searches."""
    _refuse_commands(options.words)
    from lorasweep.runner import torch_calls
    from lorasweep.runner.request import Request

    request = Request.of(options.words, options.sweep)
    planned = _planned(request, lambda asked, here, _: torch_calls.look(asked, here, True))
    loaded = torch_calls.loaded()
    from lorasweep.config import compose
    from lorasweep.runner import check, forecast, room
    from lorasweep.search.space import Space
    from lorasweep.study.meta import search_spec
    from lorasweep.training import workload

    searched = Space.from_json(planned.meta.space)
    points = [e.given for e in planned.queue]
    lines = [e.overrides for e in planned.queue]
    if None in lines:
        points = searched.corners()
        lines = [searched.line(p) for p in points]
        for dimension in searched.dimensions:
            print(f"{dimension.key}: {dimension}")
        for line in planned.said:
            print(line)
        print(f"{planned.meta.search['sampler']} draws {len(planned.queue)} trials; at the ends of the space:")
    specs = compose.compose_points([line or [] for line in lines])
    if len(specs) == 1:
        check.show(specs[0], loaded[workload.key(specs[0])])
    else:
        unset = dict.fromkeys(planned.meta.swept, "-")
        rows = [{**unset, **_named(point, planned.meta.swept)} for point in points]
        check.show_grid(specs, rows, loaded)
        for line in planned.notes:
            print(line)
    expected = forecast.said(planned.meta.expected_s, search_spec(planned.meta.search))
    print(f"{'time:':13}{expected or 'not known: no step was timed here'}")
    print(f"{'disk:':13}{room.told(planned.disk_bytes, planned.folder.parent)}")
    for line in (*planned.point_notes, *planned.never):
        print(line)
    return 0
