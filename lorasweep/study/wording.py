"""The answer in sentences: the terminal, report.html, report.md, best.yaml and MLflow's note all say these."""

from collections.abc import Sequence

from lorasweep.study.answer import FEWEST_GROUPS, FEWEST_ROWS, Answer, Candidate, better

MOST_NAMED = 6
"""Candidates that a sentence names; the table has all."""


def sentences(found: Answer) -> list[str]:
    """Return the answer: the best, what may be as good, what was compared, what is cheaper, what was left out."""
    best = found.best
    if best is None:
        return [_nothing(found)]
    compared = [_best(found, best), _others(found, best), _population(found, best), _cheaper(found, best)]
    out = [*compared, _apart(found), _left_out(found)]
    return [s for s in out if s]


def text(found: Answer) -> str:
    """Return the answer as one paragraph."""
    return " ".join(sentences(found))


def _nothing(found: Answer) -> str:
    ended = {state: n for state, n in found.ended.items() if state != "COMPLETE"}
    if not ended:
        return "No trial is complete yet. There is nothing to choose from."
    return f"No trial was completed ({_states(ended)}). There is nothing to choose from."


def _best(found: Answer, best: Candidate) -> str:
    sure = f" (95 % interval {best.interval})" if best.interval else ""
    if best.repeated:
        seeds = f"the mean of {counted(best.seeds, 'new seed')}" if best.seeds > 1 else "with a new seed"
        said = f", {seeds}{sure}; the search's own run had {best.searched:.4f}"
    elif best.seeds > 1:
        said = f", the mean of {best.seeds} seeds{sure}"
    else:
        said = sure
    which = "Of the trials with its eval rows, t" if found.apart else "T"
    begin = f"So far, {which[:1].lower()}{which[1:]}" if found.going_on else which
    line = f"{begin}{best.label[1:]} is best{_tested(found, best)} with eval {found.metric} {best.value:.4f}{said}."
    # Where one is clearly ahead on every resample, choosing it flattered nobody.
    if found.corrected is not None and better(best.value, found.corrected, found.maximize):
        line += (
            f" It was chosen as the {'highest' if found.maximize else 'lowest'} of {found.compared + 1} on these "
            f"rows; without that choice expect {found.corrected:.4f}."
        )
    return line


def _tested(found: Answer, best: Candidate) -> str:
    """Return the test metric, which chose nothing, and whose it is."""
    tested = found.tested
    if tested is None:
        return ""
    sure = f" (95 % {tested.interval})" if tested.interval else ""
    whose = " by its first run's adapter" if best.seeds > 1 or best.repeated else ""
    return f": test {found.metric} {tested.value:.4f}{sure}{whose},"


def _others(found: Answer, best: Candidate) -> str:
    others = len([c for c in found.candidates if c.is_comparable(best)]) - 1
    if not others and found.apart:
        return "It is the only complete one with those."
    if not others:
        return "It is the only complete one."
    if not found.compared:
        count, fewest = (found.rows, FEWEST_ROWS) if found.groups is None else (found.groups, FEWEST_GROUPS)
        few = 0 < count < fewest
        why = f"{_examples(found)} are too few" if few else "nothing tells how sure the choice is"
        return f"It was compared with no other: {why}."
    said = []
    if found.alike:
        said.append(f"As good as it, for all these data show: {_list(found, found.alike)}.")
    if found.worse:
        said.append(f"Worse: {_numbers(found.worse)}.")
    if found.visible is not None:
        said.append(f"A difference under {found.visible:.4f} does not show with {_examples(found)}.")
    return " ".join(said)


def _examples(found: Answer) -> str:
    """Return how many eval examples there are, and in how many groups that belong together."""
    groups = "" if found.groups is None else f" in {counted(found.groups, 'group')}"
    return f"{counted(found.rows, 'eval example')}{groups}"


def _apart(found: Answer) -> str:
    """Return the best candidate on each other set of eval rows."""
    others = "; ".join(f"{c.label} {c.value:.4f}" for c in found.apart)
    rule = "Trials with other eval rows are not compared with it; the best on each of them"
    return f"{rule}: {others}." if others else ""


def _population(found: Answer, best: Candidate) -> str:
    """Return what was compared: trained models or configurations."""
    if not found.compared:
        return ""
    if not found.by_seeds:
        models = counted(found.compared + 1, "trained model")
        return (
            f"These are {models}, one seed each, compared on the same eval examples (model confidence set, 95 %); "
            "another seed may order the configurations otherwise: search.repeats=3 tells."
        )
    alone = len(found.candidates) - 1 - found.compared
    left = f" {counted(alone, 'other')} ran with one seed and {_is(alone)} not compared." if alone else ""
    return (
        f"{counted(found.compared + 1, 'configuration')} with several seeds were compared, by examples and seeds "
        f"(model confidence set, 95 %).{left}"
    )


def _cheaper(found: Answer, best: Candidate) -> str:
    cheap = found.cheapest
    if cheap is None:
        return ""
    if cheap.number == best.number:
        return f"No cheaper one is shown to be within {found.margin:.4f} of it (search.margin)."
    share = cheap.costs["trainable"] / best.costs["trainable"]
    return (
        f"Cheapest that is shown to be within {found.margin:.4f} (search.margin): {cheap.label} with eval "
        f"{found.metric} {cheap.value:.4f} and {100 * share:.0f} % of its trainable parameters."
    )


def _left_out(found: Answer) -> str:
    bad = [c for c in found.candidates if c.failed]
    said = []
    if bad:
        said.append(f"Not chosen, because a repeat did not end complete: {_numbers(bad)}.")
    rest = {state: n for state, n in found.ended.items() if state != "COMPLETE"}
    if rest:
        total = sum(found.ended.values())
        said.append(f"Of {counted(total, 'trial')} {_states(rest)}; only finished ones are compared.")
    return " ".join(said)


def _states(counts: dict[str, int]) -> str:
    words = {"PRUNED": "pruned", "FAIL": "failed", "COMPLETE": "finished"}
    return ", ".join(f"{n} {_was(n)} {words.get(state, state.lower())}" for state, n in counts.items())


def _list(found: Answer, candidates: Sequence[Candidate]) -> str:
    parts = [f"{c.label}, {_gap(found, c)}" for c in candidates[:MOST_NAMED]]
    more = len(candidates) - MOST_NAMED
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _gap(found: Answer, candidate: Candidate) -> str:
    gap = candidate.gap
    if gap is None:
        return "not compared"
    worse, ahead = ("lower", "higher") if found.maximize else ("higher", "lower")
    word = worse if gap.value >= 0 else ahead
    low, high = gap.interval.low, gap.interval.high
    if gap.value < 0:
        low, high = -high, -low
    return f"{abs(gap.value):.4f} {word} ({low:.4f} to {high:.4f})"


def _numbers(candidates: Sequence[Candidate]) -> str:
    shown = ", ".join(str(c.number) for c in candidates[:MOST_NAMED])
    more = len(candidates) - MOST_NAMED
    noun = "trial" if len(candidates) == 1 else "trials"
    return f"{noun} {shown}" + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Return `1 trial`, `2 trials`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"
