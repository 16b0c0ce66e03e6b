"""The answer in sentences, which terminal, report.html, report.md, best.yaml, MLflow's note and export's card say."""

import math
from collections.abc import Sequence

from lorasweep.config.measures import COSTS
from lorasweep.study.answer import FEWEST_GROUPS, Answer
from lorasweep.study.baselines import NAMES, Baseline
from lorasweep.study.candidate import Candidate
from lorasweep.study.direction import better
from lorasweep.tasks.metric import BITS_PER_BYTE

MOST_NAMED = 6
"""Candidates that a sentence names; the table has all."""
MOST_KEYS = 2
"""Values that tell what a trial is where several are named; with more, its number does, and the table has them."""


def sentences(found: Answer) -> list[str]:
    """Return the answer: what to use and how good it is on unseen rows, what would do as well, what is cheaper, what
    was not shown or left out, and what to run next.
    """
    best = found.best
    if best is None:
        return [s for s in (_nothing(found), _not_begun(found)) if s]
    compared = [
        _others(found, best),
        _population(found, best),
        _cheaper(found, best),
        _front(found),
        _seeds(found, best),
    ]
    out = [
        _best(found, best),
        _unit(found),
        _unseen(found, best),
        _trivial(found),
        _baselines(found, best),
        _rising(found),
        *compared,
    ]
    out += [_apart(found), _left_out(found), _not_begun(found), _next(found)]
    return [s for s in out if s]


def text(found: Answer) -> str:
    """Return the answer as one paragraph."""
    return " ".join(sentences(found))


def _nothing(found: Answer) -> str:
    ended = {state: n for state, n in found.ended.items() if state != "COMPLETE"}
    if not ended:
        return "No trial is complete yet. There is nothing to choose from."
    return f"No trial was completed ({_states(ended)}). There is nothing to choose from."


def of_trial(found: Answer, number: int) -> str:
    """Return what the answer says of one trial, for the card of its adapter; "" where it was not chosen among."""
    best = found.best
    one = next((c for c in found.candidates if number in (c.number, *c.scored)), None)
    if best is None or one is None:
        return ""
    if one is best:
        return " ".join(s for s in (_best(found, best), _unit(found), _unseen(found, best), _trivial(found)) if s)
    line = f"T{one.label[1:]} has {_metric(found, one)}. The study's best is {best.label} with {_metric(found, best)}"
    if one.gap is None:
        return f"{line}; the two were not compared."
    how = "as good as it, for all these data show" if one.alike else "worse"
    return f"{line}; this one is {how}: {_gap(found, one)}."


def _best(found: Answer, best: Candidate) -> str:
    which = "Of the trials with its eval rows, t" if found.apart else "T"
    begin = f"So far, {which[:1].lower()}{which[1:]}" if found.going_on else which
    line = f"{begin}{best.label[1:]} is best{_tested(found, best)} with {_metric(found, best)}."
    # Where one is clearly ahead on every resample, choosing it flattered nobody.
    if found.corrected is not None and better(best.value, found.corrected, found.maximize):
        line += f" {_choice(found, best)}; without that choice expect {found.corrected:.4f}."
    return line


def _choice(found: Answer, best: Candidate) -> str:
    """Return what the best one was chosen among on the eval rows: trials, and evaluations of each."""
    highest = "highest" if found.maximize else "lowest"
    trials = found.compared + 1
    if found.by_seeds or trials == 1:
        each = "Each run is" if best.seeds > 1 else "It is"
        return f"{each} the {highest} of {found.evaluations} evaluations on these rows"
    among = f"{found.evaluations} evaluations of {trials} trials" if found.evaluations > trials else trials
    return f"It was chosen as the {highest} of {among} on these rows"


def _metric(found: Answer, candidate: Candidate) -> str:
    """Return a candidate's eval metric, how sure it is, and of which runs."""
    sure = f" (95 % interval {candidate.interval})" if candidate.interval else ""
    if candidate.repeated:
        seeds = f"the mean of {counted(candidate.seeds, 'new seed')}" if candidate.seeds > 1 else "with a new seed"
        said = f", {seeds}{sure}; the search's own run had {candidate.searched:.4f}"
    elif candidate.seeds > 1:
        said = f", the mean of {candidate.seeds} seeds{sure}"
    else:
        said = sure
    return f"eval {found.metric} {candidate.value:.4f}{said}"


def _unit(found: Answer) -> str:
    if found.metric != BITS_PER_BYTE.name:
        return ""
    return f"{found.metric} is what the supervised text costs in bits a UTF-8 byte, whatever tokens it is cut into."


def _unseen(found: Answer, best: Candidate) -> str:
    """Return what is not known of unseen rows, and where an interval is too narrow."""
    said = []
    if found.tested is None and not found.going_on:
        said.append("How good it is on unseen rows is not known: the test split was not read.")
    if found.groups is not None and found.groups < FEWEST_GROUPS and best.interval is not None:
        said.append(f"With {counted(found.groups, 'group')} of rows that belong together the intervals are too narrow.")
    return " ".join(said)


def _trivial(found: Answer) -> str:
    """Return what trivial answers reach, to be read beside the best one's metric."""
    if not found.baseline:
        return ""
    on_test = found.tested.baseline if found.tested else {}
    parts = [
        f"{name.replace('_', ' ')} {value:.4f} on eval" + (f", {on_test[name]:.4f} on test" if name in on_test else "")
        for name, value in found.baseline.items()
    ]
    said = f"To compare with: {'; '.join(parts)}."
    if found.not_beaten:
        what = f"{found.not_beaten.replace('_', ' ')} {found.baseline[found.not_beaten]:.4f}"
        said += (
            f" It is no better than the trivial answer ({what}); perhaps it needs more steps or another learning rate."
        )
    return said


def _baselines(found: Answer, best: Candidate) -> str:
    """Return how far the best one is from the base as it is, a head alone and full fine-tuning."""
    said = [_baseline(b, best, found.maximize) for b in found.baselines]
    return f"{best.label[:1].upper()}{best.label[1:]} is {'; '.join(said)}." if said else ""


def _baseline(other: Baseline, best: Candidate, maximize: bool) -> str:
    """Return the distance to a baseline, with its interval, and of how many times the parameters that has trained."""
    gap = other.value - best.value if not maximize else best.value - other.value
    way = "better than" if gap > 0 else "worse than" if gap < 0 else "from"
    sure = f", 95 % {other.interval}" if other.interval is not None else ""
    line = f"{abs(gap):.4f} {way} {NAMES[other.name]} (trial {other.number}, {other.value:.4f}{sure})"
    ours = best.costs.get("trainable")
    if other.trainable and ours and other.trainable > ours:
        line += f", which trains {other.trainable / ours:,.0f} times the parameters"
    return line


def _rising(found: Answer) -> str:
    """Return that the best one had not ended learning."""
    if found.rising is None:
        return ""
    (step, value), (last, reached) = found.rising
    return (
        f"It was still getting better when it ended: eval {found.metric} {value:.4f} at step {step}, {reached:.4f} at "
        f"step {last}. Longer training may gain more than another configuration."
    )


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
        if found.is_too_few:
            why = f"{_examples(found)} {'are' if found.rows != 1 or found.groups else 'is'} too few"
        elif best.repeated or best.seeds > 1:
            why = "too few runs have other seeds to tell how far a seed moves one"
        else:
            why = "nothing tells how sure the choice is"
        return f"It was compared with no other: {why}."
    said = []
    if found.alike:
        said.append(f"As good as it, for all these data show: {_list(found, found.alike)}.")
    if found.worse:
        said.append(f"Worse: {_numbers(found.worse)}.")
    if found.visible is not None and _is_seen(found.visible):
        said.append(f"A difference under {found.visible:.4f} does not show with {_examples(found)}{_needed(found)}.")
    return " ".join(said)


def _needed(found: Answer) -> str:
    """Return how many such examples would show a difference of the margin; "" where seeds have a part in it."""
    if found.by_seeds or found.visible is None or not 0 < found.margin < found.visible:
        return ""
    count = found.rows * (found.visible / found.margin) ** 2
    digits = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return f"; one of {found.margin:.4f} (search.margin) would take about {round(count / digits) * digits:,}"


def _examples(found: Answer) -> str:
    """Return how many eval examples there are, and in how many groups that belong together."""
    groups = "" if found.groups is None else f" in {counted(found.groups, 'group')}"
    return f"{counted(found.rows, 'eval example')}{groups}"


def _apart(found: Answer) -> str:
    """Return the best candidate on each other set of eval rows."""
    others = "; ".join(f"{_name(c)} {c.value:.4f}" for c in found.apart)
    rule = "Trials with other eval rows are not compared with it; the best on each of them"
    return f"{rule}: {others}." if others else ""


def _population(found: Answer, best: Candidate) -> str:
    """Return what was compared: trained models or configurations."""
    if not found.compared:
        return ""
    if not found.by_seeds:
        models = counted(found.compared + 1, "trained model")
        return (
            f"These are {models}, one seed each, compared on the same {_examples(found)} (model confidence set, 95 %); "
            "another seed may order the configurations otherwise."
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
        others = [c.costs["trainable"] for c in found.candidates if c.is_comparable(best) and "trainable" in c.costs]
        if best.costs["trainable"] <= min(others):
            return "No other one has fewer trainable parameters."
        return f"No cheaper one is shown to be within {found.margin:.4f} of it (search.margin)."
    share = cheap.costs["trainable"] / best.costs["trainable"]
    return (
        f"Cheapest that is shown to be within {found.margin:.4f} (search.margin): {cheap.label} with eval "
        f"{found.metric} {cheap.value:.4f} and {100 * share:.0f} % of its trainable parameters."
    )


def _left_out(found: Answer) -> str:
    bad = [c for c in found.candidates if c.failed and c is not found.best]
    said = []
    if found.best is not None and found.best.failed:
        said.append(
            f"{counted(len(found.best.failed), 'repeat')} of the best did not end complete: take it with care, "
            "no configuration has ended all its runs."
        )
    if bad:
        said.append(f"Not chosen, because a repeat did not end complete: {_numbers(bad)}.")
    rest = {state: n for state, n in found.ended.items() if state != "COMPLETE"}
    if rest:
        total = sum(found.ended.values())
        rule = "; only finished ones are compared" if len(found.candidates) > 1 else ""
        said.append(f"Of {counted(total, 'trial')} {_states(rest)}{rule}.")
    if found.over_memory:
        said.append(
            f"{found.over_memory} {_was(found.over_memory)} never begun: more memory than search.max_memory_gib allows."
        )
    return " ".join(said)


def _not_begun(found: Answer) -> str:
    if not found.waiting or not found.not_begun:
        return ""
    return f"{counted(found.waiting, 'trial')} {_was(found.waiting)} not begun: {found.not_begun}."


def _front(found: Answer) -> str:
    """Return the Pareto front of each cost that the search made small too."""
    said = []
    for cost in found.objectives:
        numbers = found.fronts.get(cost, ())
        shown = [c for n in numbers for c in found.candidates if c.number == n]
        if shown:
            beat = "has none that beats it" if len(shown) == 1 else "have none that beats them"
            text = _numbers(shown)
            said.append(f"{text[:1].upper()}{text[1:]} {beat} in {found.metric} and {COSTS[cost].title} at once.")
    return " ".join(said)


def _seeds(found: Answer, best: Candidate) -> str:
    """Return how far repeats until the margin came."""
    doubt = found.doubt
    if not found.is_auto or doubt is None or not found.again or found.going_on:
        return ""
    after = counted(found.again, "repeat")
    if doubt.number == best.number:
        return f"search.repeats=auto: after {after} seeds leave its mean unsure by {doubt.at_most:.4f} (95 %)."
    if not _is_seen(doubt.at_most):
        return (
            f"search.repeats=auto: after {after}, no other configuration that ran again is better, as far as seeds "
            "tell (95 %)."
        )
    if doubt.at_most < found.margin:
        return (
            f"search.repeats=auto: after {after}, no other configuration that ran again is better by more than "
            f"{found.margin:.4f} (search.margin) as far as seeds tell: at most {doubt.at_most:.4f} (95 %)."
        )
    return (
        f"search.repeats=auto: {after} {_is(found.again)} spent, and trial {doubt.number} may still be better by up to "
        f"{doubt.at_most:.4f} as far as seeds tell (95 %), more than {found.margin:.4f} (search.margin)."
    )


def _next(found: Answer) -> str:
    """Return what to run next and how long that takes."""
    if found.going_on:
        return ""
    if found.lacks_rows:
        return (
            f"What is unsure comes from the {_examples(found)}: more seeds would not tell, a larger eval split would."
        )
    if found.next is None:
        return (
            f"Nothing is left to run for a margin of {found.margin:.4f}: each one compared is worse, or shown to be "
            "within it."
        )
    runs = counted(found.next.runs, "run")
    long = "" if found.next.seconds is None else f", about {_long(found.next.seconds)}"
    return f"To know more, run: {found.next.command} ({found.next.what}; at most {runs}{long})."


def _long(seconds: float) -> str:
    """Return a time as a person would say it."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    if seconds < 90 * 60:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def _states(counts: dict[str, int]) -> str:
    words = {"PRUNED": "{} {} pruned", "FAIL": "{} failed", "COMPLETE": "{} finished"}
    return ", ".join(words[state].format(n, _was(n)) for state, n in counts.items())


def _list(found: Answer, candidates: Sequence[Candidate]) -> str:
    parts = [f"{_name(c)}, {_gap(found, c, '' if k else '95 % ')}" for k, c in enumerate(candidates[:MOST_NAMED])]
    more = len(candidates) - MOST_NAMED
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _name(candidate: Candidate) -> str:
    return candidate.label if len(candidate.point) <= MOST_KEYS else f"trial {candidate.number}"


def _gap(found: Answer, candidate: Candidate, level: str = "95 % ") -> str:
    gap = candidate.gap
    if gap is None:
        return "not compared"
    worse, ahead = ("lower", "higher") if found.maximize else ("higher", "lower")
    word = worse if gap.value >= 0 else ahead
    low, high = gap.interval.low, gap.interval.high
    if not _is_seen(gap.value):
        return "no difference" + (f" ({low:.4f} to {high:.4f})" if _is_seen(low) or _is_seen(high) else "")
    if gap.value < 0:
        low, high = -high, -low
    return f"{abs(gap.value):.4f} {word} ({level}{low:.4f} to {high:.4f})"


def _numbers(candidates: Sequence[Candidate]) -> str:
    shown = ", ".join(str(c.number) for c in candidates[:MOST_NAMED])
    more = len(candidates) - MOST_NAMED
    noun = "trial" if len(candidates) == 1 else "trials"
    return f"{noun} {shown}" + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Return `1 trial`, `2 trials`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _is_seen(value: float) -> bool:
    """Return whether a number is more than 0 as it is written."""
    return f"{abs(value):.4f}" != f"{0:.4f}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"
