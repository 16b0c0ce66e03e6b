"""Rounds of repeats: after the search the best configurations run again, each round with one new seed.

The first round takes the best `search.repeat_top` and the cheapest that is near enough. Each later one takes the two
configurations (a difference needs two runs of one seed) of which one more run is expected to better the choice most.
It ends when the budget, `search.repeats` runs for each of the first round, is spent, or when no number of runs is
expected to gain a tenth of the margin and the best has two new seeds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorasweep.config.overrides import without
from lorasweep.study import answer, repeats
from lorasweep.study.belief import near_enough
from lorasweep.study.meta import Entry
from lorasweep.study.repeats import Race
from lorasweep.study.study import Study

RUNS_A_ROUND = 2
FRESH_RUNS_OF_THE_BEST = 2
"""The mean that is reported is one of new seeds: of this many at least, where the budget has them."""
WORTH_THE_REST = 0.1
"""Of the margin: what more runs, however many, have to be expected to gain. One run alone seldom gains as much."""


def next_round(study: Study) -> list[int]:
    """Queue the next repeats and return their numbers; [] where trials still wait, or none is worth it.

    What exists is not queued again, so that a study that was stopped anywhere goes on from there.
    """
    if not study.search.repeats or study.waiting() or study.running() or study.spent():
        return []
    found = _chosen(study)
    again = repeats.repeats(study.trials())
    left = study.search.repeats * len(found.candidates) - sum(len(rounds) for rounds in again.values())
    if left <= 0:
        return []
    untried = [n for n in found.candidates if not again.get(n)]
    number = 1 if untried else 1 + max(r for rounds in again.values() for r in rounds)
    members = untried or _worth_a_run(study, found)[: min(RUNS_A_ROUND, left)]
    return study.run_again(found, [_entry(study.trial(n), found, number) for n in members])


def _worth_a_run(study: Study, found: Race) -> list[int]:
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
        return ranked
    best = study.best()
    if best is None or len(repeats.repeats(study.trials()).get(best.number, {})) >= min(
        FRESH_RUNS_OF_THE_BEST, study.search.repeats
    ):
        return []
    return [best.number, *(n for n in ranked if n != best.number)]


def _chosen(study: Study) -> Race:
    """Return the race: the best `repeat_top` and the cheapest near enough, with those that run again already."""
    found, trials = study.racing(), study.trials()
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
