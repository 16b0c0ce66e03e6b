"""Rounds of repeats: after the search the best configurations run again, each round with one new seed.

The first round takes the best `search.repeat_top` and the cheapest that is near enough. Each later one takes the three
configurations (a difference needs runs of one seed) of which one more run is expected to better the choice most. It
ends when the budget, `search.repeats` runs for each of the first round, is spent, or when no number of runs is
expected to gain a thirtieth of the margin and the best has two new seeds.

With `search.repeats=auto` each later round takes the best and the one that may be better by most, until that is less
than the margin. Source: S. Kalyanakrishnan et al., PAC Subset Selection in Stochastic Multi-armed Bandits, 2012.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorasweep.config.overrides import without
from lorasweep.study import answer, repeats
from lorasweep.study.belief import near_enough
from lorasweep.study.meta import Entry
from lorasweep.study.repeats import Race
from lorasweep.study.study import Study

RUNS_A_ROUND = 3
"""A round has a seed, whose effect on all has to be found too: of two runs that takes half of what they tell, of three
a third."""
HOPELESS = 0.001
"""Of the largest gain: a third member that gains less is left out."""
FRESH_RUNS_OF_THE_BEST = 2
"""The mean that is reported is one of new seeds: of this many at least, where the budget has them."""
FEWEST_AUTO_RUNS = 3
"""Repeats that `search.repeats=auto` has for each of the first round, where no hours limit it."""
WORTH_THE_REST = 1 / 30
"""Of the margin: what all further runs together have to be expected to gain. In simulations with a spread over seeds of
half a margin a tenth saves 2 of 13 runs and leaves a hundredth of a margin more to be had, as much as repeats by belief
gain there over equal shares; a thirtieth takes as many runs as those.
"""


def next_round(study: Study) -> list[int]:
    """Queue the next repeats and return their numbers; [] where trials still wait, or none is worth it.

    What exists is not queued again, so that a study that was stopped anywhere goes on from there.
    """
    if not study.search.repeats or study.ready() or study.queue.running() or study.spent():
        return []
    found = _chosen(study)
    again = repeats.repeats(study.trials())
    left = _most(study, found) - sum(len(rounds) for rounds in again.values())
    if left <= 0:
        return []
    untried = [n for n in found.candidates if not again.get(n)]
    number = 1 if untried else 1 + max(r for rounds in again.values() for r in rounds)
    most = study.search.repeats
    wanted = _doubtful(study, found) if most == repeats.AUTO else _worth_a_run(study, int(most))
    members = untried or wanted[: int(min(RUNS_A_ROUND, left))]
    return study.run_again(found, [_entry(study.trial(n), found, number) for n in members])


def _most(study: Study, found: Race) -> float:
    """Return how many repeats there may be."""
    search = study.search
    if search.repeats != repeats.AUTO:
        return int(search.repeats) * len(found.candidates)
    if search.device_hours or search.wall_hours:
        return math.inf
    return max(FEWEST_AUTO_RUNS * len(found.candidates), sum(repeats.is_searched(t) for t in study.trials()))


def _doubtful(study: Study, found: Race) -> list[int]:
    """Return the best and the configuration that may be better by most; [] where that is less than the margin.

    Before seeds tell which that is, the next best one.
    """
    best = study.best()
    trials, maximize = study.trials(), study.meta.maximize
    if best is None or best.number in repeats.failed(trials):
        return []
    doubt = repeats.doubt(trials, maximize)
    fresh = len(repeats.repeats(trials).get(best.number, {}))
    margin = near_enough(study.search.margin, study.meta.bounds, best.values[0])
    if doubt is not None and doubt.at_most < margin and fresh >= FRESH_RUNS_OF_THE_BEST:
        return []
    others = [doubt.number] if doubt is not None else found.candidates
    return list(dict.fromkeys([best.number, *others]))


def _worth_a_run(study: Study, most: int) -> list[int]:
    """Return the configurations of which one more run may change the choice, the most helpful first."""
    held = repeats.beliefs(study.trials(), study.meta.maximize)
    if held is None:
        return []
    if len(held.mean) == 1:  # nothing to choose: more runs make its own mean surer
        return list(held.mean)
    margin = near_enough(study.search.margin, study.meta.bounds, abs(held.mean[held.best]))
    gains = {n: held.gain(n) for n in held.mean}
    ranked = sorted(gains, key=lambda n: (-gains[n], n))
    if held.left_open() >= WORTH_THE_REST * margin:
        return [n for place, n in enumerate(ranked) if place < 2 or gains[n] > HOPELESS * gains[ranked[0]]]
    best = study.best()
    if best is None or len(repeats.repeats(study.trials()).get(best.number, {})) >= min(FRESH_RUNS_OF_THE_BEST, most):
        return []
    return [best.number, *(n for n in ranked if n != best.number)][:2]


def _chosen(study: Study) -> Race:
    """Return the race: the best `repeat_top` and the cheapest near enough, with those that run again already."""
    found, trials = study.signals.racing(), study.trials()
    searched = repeats.complete(trials)
    if not searched or (found.candidates and found.searched == len(searched)):
        return found
    held = repeats.beliefs(searched, study.meta.maximize)
    ranked = sorted(held.mean, key=lambda n: (-held.mean[n], n)) if held else []
    cheap = answer.answer(study).cheapest
    chosen = [*found.candidates, *ranked[: study.search.repeat_top], *([cheap.number] if cheap else [])]
    seed = found.seed if found.candidates else max(map(repeats.seed_of, searched))
    return replace(found, candidates=tuple(dict.fromkeys(chosen)), seed=seed, searched=len(searched))


def _entry(trial: Any, found: Race, number: int) -> Entry:
    """Return a repeat: the trial's own overrides with another seed."""
    seed = (found.seed + number) % repeats.MOST_SEED
    known = trial.user_attrs
    given = dict(known["swept"]) | ({repeats.SEED_KEY: seed} if repeats.SEED_KEY in known["swept"] else {})
    return Entry(
        _with_seed(known["overrides"], seed),
        given,
        start_from=known.get("start_from"),
        repeat_of=trial.number,
        repeat=number,
    )


def _with_seed(overrides: Sequence[str], seed: int) -> list[str]:
    kept = without(overrides, [repeats.SEED_KEY])
    return [*kept, f"{repeats.SEED_KEY}={seed}"]
