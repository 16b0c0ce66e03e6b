"""The rounds of a race: after the search, the best trials run again with other seeds, a seed a round."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorasweep.config.overrides import without
from lorasweep.study import answer, repeats
from lorasweep.study.meta import Entry
from lorasweep.study.repeats import Race
from lorasweep.study.study import Study


def next_round(study: Study) -> list[int]:
    """Queue the next repeats and return their numbers; [] where trials still wait, or none can change the answer.

    Candidates that cannot reach the best any more are dropped. What is there already is not queued again, so that a
    study that was stopped anywhere goes on from there.
    """
    if not study.search.repeats or study.waiting() or study.running() or study.spent():
        return []
    found = _chosen(study)
    done = repeats.repeats(study.trials())
    rounds = [len(done.get(n, {})) for n in found.live]
    if not rounds or min(rounds) >= study.search.repeats:
        return []
    number = min(rounds) + 1
    if number > 1 and min(rounds) == max(rounds):
        lost = repeats.out_of_reach(study.trials(), found, study.meta.maximize)
        found = replace(found, dropped={**found.dropped, **dict.fromkeys(lost, number - 1)})
        if len(found.live) == 1 and len(found.candidates) > 1:
            study.run_again(found, [])
            return []
    return study.run_again(found, [_entry(study.trial(n), found, number) for n in found.live])


def _chosen(study: Study) -> Race:
    """Return the race: the best `repeat_top` and the cheapest within noise, with those that run again already."""
    found, trials = study.racing(), study.trials()
    complete = repeats.complete(trials)
    if not complete or (found.candidates and found.searched == len(complete)):
        return found
    sign = -1 if study.meta.maximize else 1
    ranked = [t.number for t in sorted(complete, key=lambda t: (sign * t.values[0], t.number))]
    cheap = answer.answer(study).cheapest
    chosen = [*found.candidates, *ranked[: study.search.repeat_top], *([cheap.number] if cheap else [])]
    seed = found.seed if found.candidates else max(_seed(study, t) for t in complete)
    return replace(found, candidates=tuple(dict.fromkeys(chosen)), seed=seed, searched=len(complete))


def _seed(study: Study, trial: Any) -> int:
    return study.spec(trial.user_attrs["overrides"]).train.seed


def _entry(trial: Any, found: Race, number: int) -> Entry:
    """Return a repeat: the trial's own overrides with another seed."""
    seed = (found.seed + number) % repeats.MOST_SEED
    known = trial.user_attrs
    given = dict(known["swept"]) | ({"train.seed": seed} if "train.seed" in known["swept"] else {})
    return Entry(
        _with_seed(known["overrides"], seed),
        given,
        start_from=known.get("start_from"),
        repeat_of=trial.number,
        repeat=number,
    )


def _with_seed(overrides: Sequence[str], seed: int) -> list[str]:
    kept = without(overrides, ["train.seed"])
    return [*kept, f"train.seed={seed}"]
