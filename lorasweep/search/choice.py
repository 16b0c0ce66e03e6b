"""What search.sampler=auto, search.pruner=auto and search.startup_trials=auto come to, and what is said of it."""

from dataclasses import dataclass, replace

from lorasweep.config.spec import SearchSpec
from lorasweep.errors import ConfigError
from lorasweep.search import order, samplers
from lorasweep.search.order import AUTO, MOST_STARTUP
from lorasweep.search.space import Space

DEFAULT_TRIALS = 20
"""Trials where a space has no end and nothing says how many."""
FEWEST_TO_MODEL, FEWEST_TO_PRUNE = 9, 24
"""Trials from which a model of their results finds more than an even spread, and from which pruning saves much beside
those that run to their end anyway."""


@dataclass(frozen=True)
class Choice:
    """A sampler and a pruner, and the reason for each."""

    sampler: str
    pruner: str
    why_sampler: str
    why_pruner: str


def choose(trials: int) -> Choice:
    """Return what suits a number of trials, where not every point can be tried.

    Regret in points on 12 invented data sets (benchmarks/landscapes.py; recipes and space of sweeps/recipes_24; the
    device time of as many whole trials; 95 % intervals are 0.5 to 1.9): at 12 trials qmc 3.2, tpe 3.7, random 3.9,
    which chance may order; at 24 random 3.6, qmc 3.3, tpe 2.6, with asha 2.3 to 2.4, with median 2.2. No real curves
    have said so yet.
    """
    models, prunes = trials >= FEWEST_TO_MODEL, trials >= FEWEST_TO_PRUNE
    return Choice(
        "tpe" if models else "qmc",
        "asha" if prunes else "none",
        f"{trials} trials are enough to learn from" if models else f"{trials} trials are too few to learn from",
        "many would train to their end for nothing" if prunes else f"fewer than {FEWEST_TO_PRUNE} trials save little",
    )


def settled(search: SearchSpec, space: Space) -> SearchSpec:
    """Return the settings with a choice in place of each auto."""
    is_grid = search.sampler == "grid" or (search.sampler == AUTO and _takes_every_point(search, space))
    trials = search.trials or DEFAULT_TRIALS
    found = choose(trials)
    if is_grid:
        found = replace(found, sampler="grid", pruner="none")
    startup = search.startup_trials
    if startup == AUTO:
        startup = max(min(MOST_STARTUP, trials // 3), search.workers, len(search.enqueue or []), samplers.LEAST_RESULTS)
    return replace(
        search,
        sampler=found.sampler if search.sampler == AUTO else search.sampler,
        pruner=found.pruner if search.pruner == AUTO else search.pruner,
        startup_trials=startup,
        in_flight=order.in_flight(search),
    )


def said(asked: SearchSpec, search: SearchSpec) -> list[str]:
    """Return what a person should know of how points are drawn, a sentence each; nothing of a plain grid."""
    if search.sampler == "grid":
        return []
    trials = search.trials or DEFAULT_TRIALS
    found = choose(trials)
    sampler = f"search.sampler={search.sampler}" + (f" ({found.why_sampler})" if asked.sampler == AUTO else "")
    pruner = f"search.pruner={search.pruner}" + (f" ({found.why_pruner})" if asked.pruner == AUTO else "")
    return [f"{sampler}, {pruner}: {_drawn(search, trials)}", *blind(search)]


def blind(search: SearchSpec) -> list[str]:
    """Return a warning where a sampler that learns is asked for and would draw every point before it sees a result."""
    trials, startup = search.trials or DEFAULT_TRIALS, search.startup_trials
    if not samplers.learns(search) or not isinstance(startup, int) or startup < trials:
        return []
    why = f"{search.workers} workers" if startup == search.workers else f"search.startup_trials={startup}"
    return [
        f"{trials} trials at {why}: {search.sampler} sees no result before the last draw; take more trials, or fewer "
        + ("workers" if startup == search.workers else "startup_trials")
    ]


def _drawn(search: SearchSpec, trials: int) -> str:
    startup = search.startup_trials
    if not samplers.learns(search) or not isinstance(startup, int):
        return f"{trials} points that no result changes"
    if startup >= trials:
        return f"{trials} points spread over the space"
    most = order.in_flight(search)
    seen = [order.sees(place, startup, most) for place in range(startup, trials)]
    return (
        f"{startup} points to begin with, then each of {trials - startup} is drawn by what those before it have shown, "
        f"{seen[0]} results for the first, {seen[-1]} for the last"
    )


def _takes_every_point(search: SearchSpec, space: Space) -> bool:
    if search.trials is not None:
        return space.points(search.trials) is not None
    try:
        for dimension in space.dimensions:
            dimension.values()
    except ConfigError:
        return False
    return True
