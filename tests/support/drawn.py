"""A study without training: trials, scores and repeats are drawn, the answer is the package's own."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from optuna.trial import TrialState
from scipy.stats import norm

from lorasweep.config.spec import SearchSpec
from lorasweep.serving.champion import Score, beats
from lorasweep.study import answer, repeat_rounds, repeats
from lorasweep.tasks.metric import Parts

EXAMPLES = 400
ROWS_SD, RUN_SD = 0.64, 0.90
"""Points: what 400 rows do to a configuration, and to one run of it beside its seed (accuracy 0.8, 13 % of the answers
of two models differ)."""
COMMON_SHARE = 0.5
"""Of a seed's variance: what it does to all configurations alike."""
SEEDS = 32
"""More than any number of repeats asks for."""
BOUNDS = {"accuracy": (0.0, 1.0), "loss": (0.0, math.inf), "pearson": (-1.0, 1.0)}


class Drawn:
    """A study whose runs are drawn by draw(configuration, seed) -> metric, Parts."""

    def __init__(self, draw, *, metric="accuracy", maximize=True, **search):
        self.meta = SimpleNamespace(
            metric=metric, maximize=maximize, name="drawn", place="outputs/drawn", bounds=BOUNDS[metric]
        )
        self.search = SearchSpec(**search)
        self.draw, self.list, self.race, self.drawn = draw, [], repeats.Race(), {}
        self.queue = SimpleNamespace(waiting=lambda: 0, running=lambda: 0)
        self.signals = SimpleNamespace(racing=lambda: self.race)

    def search_for(self, count, trainable=lambda k: 100.0 * (k + 1)):
        self.repeat_all(count, trainable)
        return answer.answer(self)

    def repeat_all(self, count, trainable=lambda k: 100.0 * (k + 1)):
        for k in range(count):
            known = {"overrides": [f"lora.r={k + 1}"], "swept": {"lora.r": k + 1}, "trainable": trainable(k)}
            self._run(k, 0, known)
        while repeat_rounds.next_round(self):
            pass

    def _run(self, k, seed, known):
        number = len(self.list)
        value, self.drawn[number] = self.draw(k, seed)
        trial = {
            "number": number,
            "state": TrialState.COMPLETE,
            "values": [float(value)],
            "params": {},
            "intermediate_values": {},
        }
        self.list.append(SimpleNamespace(**trial, user_attrs=known))

    def scores(self, number, split="eval"):
        return self.drawn[number] if split == "eval" else None

    def evaluations(self, number, least):
        return []

    def trials(self):
        return self.list

    def trial(self, number):
        return self.list[number]

    def trial_folder(self, number):
        return Path("nowhere") / str(number)

    def best(self):
        return repeats.leader(self.list, self.meta.maximize)

    def ready(self):
        return 0

    def not_begun(self):
        return ""

    def spent(self):
        return ""

    def run_again(self, race, entries):
        self.race = race
        for e in entries:
            known = {"overrides": e.overrides, "swept": {}, "repeat_of": e.repeat_of, "repeat": e.repeat}
            self._run(e.repeat_of, e.repeat, known)
        return list(range(len(entries)))


def right_or_wrong(rng, qualities, *, own_sd=0.0, common_sd=0.0, examples=EXAMPLES):
    """Return a `draw`: what is hard for one model is mostly hard for all; each run is off by its seed."""
    hard_N = rng.standard_normal(examples)
    own_KN = rng.standard_normal((len(qualities), examples))
    of_seed = {}

    def draw(k, seed):
        shift = of_seed.setdefault(seed, common_sd * rng.standard_normal())
        share = float(np.clip(qualities[k] + shift + own_sd * rng.standard_normal(), 0.01, 0.99))
        noise_N = rng.standard_normal(examples)
        latent_N = math.sqrt(0.85) * hard_N + math.sqrt(0.05) * own_KN[k] + math.sqrt(0.1) * noise_N
        right_N = (latent_N < norm.ppf(share)).astype(float)
        return right_N.mean(), Parts("accuracy", "ratio", np.arange(examples), right_N, np.ones(examples))

    return draw


def losses(rng, excess, *, examples=200):
    """Return a `draw` of losses a token: documents differ much more than models do."""
    document_N = rng.lognormal(0.0, 0.5, examples)
    tokens_N = np.full(examples, 50.0)

    def draw(k, seed):
        loss_N = (document_N + excess[k] + 0.055 * rng.standard_normal(examples)) * tokens_N
        return loss_N.sum() / tokens_N.sum(), Parts(
            "loss", "ratio", np.arange(examples), loss_N, tokens_N, (0.0, float("inf"))
        )

    return draw


def regressions(rng, noise, *, examples=200):
    """Return a `draw` of predicted numbers: `noise` of each configuration beside the label's own spread of 1."""
    label_N = rng.standard_normal(examples)

    def draw(k, seed):
        predicted_N = label_N + noise[k] * rng.standard_normal(examples)
        parts = Parts("pearson", "pearson", np.arange(examples), predicted_N, label_N, (-1.0, 1.0))
        return parts.value, parts

    return draw


def challenged(rng, count, own_sd, examples, seed_free=0):
    """Return whether the best of so many models replaces an equally good champion in the registry.

    With degrees of freedom for it, what a seed does is known.
    """
    shares = 0.8 + own_sd * rng.standard_normal(count + 1)
    splits = [right_or_wrong(rng, shares, examples=examples) for _ in range(2)]
    runs = {name: [draw(k, 0) for k in range(count + 1)] for name, draw in zip(("eval", "test"), splits, strict=True)}
    values = [value for value, _ in runs["eval"]]
    best = 1 + int(np.argmax(values[1:]))

    tested = [runs["test"][k][1] for k in (best, 0)]
    known = {"metric": "accuracy", "maximize": True, "margin": 0.01, "test_rows": "rows"}
    known |= {"seed_error": own_sd, "seed_free": seed_free} if seed_free else {}
    ours = Score(value=values[best], test=tested[0].value, chosen_among=count, **known)
    theirs = Score(value=values[0], test=tested[1].value, **known)
    return beats(ours, tested[0], theirs, tested[1])[0]


def by_seed(rng, quality_K, seed_sd):
    """Return a `draw` of metrics alone, in hundredths around 0.8: a run's is always the same. `seed_sd` in points."""
    centre_K = quality_K + ROWS_SD * rng.standard_normal(len(quality_K))
    seed_S = seed_sd * math.sqrt(COMMON_SHARE) * rng.standard_normal(SEEDS)
    own_sd = math.hypot(seed_sd * math.sqrt(1 - COMMON_SHARE), RUN_SD)
    value_KS = 0.8 + (centre_K[:, None] + seed_S + own_sd * rng.standard_normal((len(quality_K), SEEDS))) / 100

    def draw(k, seed):
        return value_KS[k, seed], None

    return draw
