"""Samplers and pruners: what they may draw, what they learn, whom they end."""

import warnings

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.spec import SearchSpec
from lorasweep.search import pruners, samplers, space

SAMPLERS = ("random", "tpe", "gp", "cmaes", "qmc", "nsga2")
MIXED = {
    "lora.init_lora_weights": "true,pissa,olora",
    "lora.r": {"low": 4, "high": 64, "log": True},
    "lora.lora_dropout": "range(0,0.5,0.1)",
    "train.learning_rate": {"low": 1e-5, "high": 3e-3, "log": True},
    "lora.use_rslora": {"choices": [True, False], "when": "lora.r > 8 and lora.init_lora_weights != 'olora'"},
    "train.weight_decay": {"low": 0.1, "high": 1, "when": "lora.use_rslora"},
}


def mixed() -> space.Space:
    found, problems = space.read([], MIXED)
    assert problems == []
    return found


class Queue:
    """A study as the claims of several processes see it: each draws with a sampler of its own."""

    def __init__(self, spec: SearchSpec, where: space.Space, maximize: bool = False) -> None:
        more = ["minimize"] * len(spec.objectives or [])
        self.optuna = optuna.create_study(study_name="s", directions=["maximize" if maximize else "minimize", *more])
        self.store, self.spec, self.space = self.optuna._storage, spec, where
        self.number = 0

    def claim(self) -> tuple[int, dict]:
        trial_id = self.store.create_new_trial(self.optuna._study_id)
        view = optuna.load_study(study_name="s", storage=self.store)
        view.sampler = samplers.make_sampler(self.spec, self.number)
        self.number += 1
        return trial_id, samplers.suggest(optuna.Trial(view, trial_id), self.space)

    def end(self, trial_id: int, value: float, state: TrialState = TrialState.COMPLETE) -> None:
        self.store.set_trial_intermediate_value(trial_id, 1, value)
        values = [value, *[1.0] * len(self.spec.objectives or [])] if state == TrialState.COMPLETE else None
        self.store.set_trial_state_values(trial_id, state, values)


def draw(spec: SearchSpec, where: space.Space, at_once: int, score=lambda p: float(p["lora.r"])) -> list[dict]:
    """Return the points of 12 trials, so many of them open at a time; every third is pruned."""
    queue, points = Queue(spec, where), []
    for _ in range(12 // at_once):
        claims = [queue.claim() for _ in range(at_once)]
        for i, (trial_id, point) in enumerate(claims, len(points)):
            queue.end(trial_id, score(point), TrialState.PRUNED if i % 3 == 2 else TrialState.COMPLETE)
        points += [point for _, point in claims]
    return points


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_draws_inside_the_space_and_conditional_keys_only_where_they_apply(sampler, at_once, caplog):
    where = mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = draw(SearchSpec(sampler=sampler, startup_trials=8, trials=12), where, at_once)
    for point in points:
        assert where.contains(point)
        assert set(point) == {d.key for d in where.dimensions if where.applies(d, point)}
    assert {len(p) for p in points} > {4}, "some conditional key was drawn"
    assert len({str(p) for p in points}) >= (8 if sampler == "nsga2" else 12), "nsga2's children may be like a parent"
    assert [r for r in caplog.records if r.name.startswith("optuna") and r.levelname != "INFO"] == []


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "cmaes"])
def test_several_objectives_and_pruned_trials_go_together(sampler):
    spec = SearchSpec(sampler=sampler, startup_trials=8, trials=12, objectives=["trainable"])
    assert len(draw(spec, mixed(), 2)) == 12


def test_cmaes_refuses_what_it_cannot_search():
    spec = SearchSpec(sampler="cmaes", objectives=["trainable"])
    assert "one objective" in samplers.problems(spec, mixed())[0]
    names, _ = space.read(["lora.bias=none,all"])
    assert "got none" in samplers.problems(SearchSpec(sampler="cmaes"), names)[0]
    assert samplers.problems(SearchSpec(sampler="cmaes"), mixed()) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trials_draw_unlike_and_the_same_number_draws_alike(sampler):
    where = mixed()

    def first(number: int, seed: int = 0) -> dict:
        study = optuna.create_study(sampler=samplers.make_sampler(SearchSpec(sampler=sampler, seed=seed), number))
        return samplers.suggest(optuna.Trial(study, study._storage.create_new_trial(study._study_id)), where)

    drawn = [first(n) for n in range(6)]
    assert len({str(p) for p in drawn}) == 6
    assert drawn == [first(n) for n in range(6)]
    assert first(3, seed=1) != drawn[3]


def test_qmc_fills_the_space_evenly():
    where, _ = space.read(["train.warmup_ratio=interval(0,1)", "lora.lora_dropout=interval(0,0.9)"])
    queue = Queue(SearchSpec(sampler="qmc"), where)
    points = [queue.claim()[1] for _ in range(16)]
    cells = {(int(p["train.warmup_ratio"] * 4), int(p["lora.lora_dropout"] / 0.9 * 4)) for p in points}
    assert len(cells) == 16, "one point in each cell of a 4 x 4 board"


def test_tpe_beats_random_on_a_bowl():
    where, _ = space.read(["train.warmup_ratio=interval(0,1)", "lora.lora_dropout=interval(0,0.9)"])

    def mean_of_the_best(sampler: str) -> float:
        best = []
        for seed in range(5):
            queue = Queue(SearchSpec(sampler=sampler, seed=seed, startup_trials=8), where)
            values = []
            for _ in range(40):
                trial_id, p = queue.claim()
                values.append((p["train.warmup_ratio"] - 0.7) ** 2 + (p["lora.lora_dropout"] - 0.2) ** 2)
                queue.end(trial_id, values[-1])
            best.append(min(values))
        return sum(best) / len(best)

    assert mean_of_the_best("tpe") < 0.5 * mean_of_the_best("random")


def test_fixed_values_of_a_recipe_are_kept():
    where = mixed()
    study = optuna.create_study(sampler=samplers.make_sampler(SearchSpec(sampler="tpe"), 0))
    waiting = optuna.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {"lora.r": 32}})
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=waiting)
    study._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert samplers.suggest(optuna.Trial(study, trial_id), where)["lora.r"] == 32


def test_configuration_decides_conditions_on_keys_that_do_not_vary():
    def drawn(*fixed: str) -> set[str]:
        where, problems = space.read(fixed, {"lora.lora_alpha": {"low": 8, "high": 64, "when": "train.epochs > 5"}})
        assert problems == []
        study = optuna.create_study()
        trial_id = study._storage.create_new_trial(study._study_id)
        return set(samplers.suggest(optuna.Trial(study, trial_id), where))

    assert drawn() == set()
    assert drawn("train.epochs=9") == {"lora.lora_alpha"}


def test_value_lies_in_its_distribution_or_not():
    found = samplers.distributions(mixed())
    inside = {"lora.r": 5, "lora.lora_dropout": 0.3, "train.learning_rate": 1e-4, "lora.init_lora_weights": True}
    outside = {"lora.r": 4.5, "lora.lora_dropout": 0.35, "train.learning_rate": 1, "lora.init_lora_weights": 1}
    assert all(samplers.holds(found[k], v) for k, v in inside.items())
    assert not any(samplers.holds(found[k], v) for k, v in outside.items())
    assert not samplers.holds(found["lora.r"], "8") and not samplers.holds(found["lora.r"], True)


# --- pruners ---------------------------------------------------------------------------------------------------------

STEPS = 16
PRUNING = {
    "asha": {"reduction_factor": 2},
    "hyperband": {"reduction_factor": 2, "min_steps": 1},
    "median": {},
    "wilcoxon": {},
    "threshold": {"lower": 0.35},
}


def curve(quality: float, step: int) -> float:
    return quality * (1 - 0.5 ** (step / 2)) + 0.3


def run(spec: SearchSpec, qualities: list[float]) -> list[FrozenTrial]:
    """Run trials one after another whose metric, maximised, nears its quality; every step is an evaluation."""
    queue = Queue(spec, mixed(), maximize=True)
    pruner = pruners.make_pruner(spec, STEPS)
    for quality in qualities:
        trial_id, _ = queue.claim()
        for step in range(1, STEPS + 1):
            queue.store.set_trial_intermediate_value(trial_id, step, curve(quality, step))
            if pruners.should_prune(pruner, queue.optuna, queue.store.get_trial(trial_id)):
                queue.store.set_trial_state_values(trial_id, TrialState.PRUNED)
                break
        else:
            values = [curve(quality, STEPS), *[1.0] * len(spec.objectives or [])]
            queue.store.set_trial_state_values(trial_id, TrialState.COMPLETE, values)
    return queue.optuna.trials


@pytest.mark.parametrize("objectives", [None, ["trainable"]])
@pytest.mark.parametrize("pruner", PRUNING)
def test_pruner_ends_the_worst_and_never_the_best(pruner, objectives):
    spec = SearchSpec(pruner=pruner, objectives=objectives, **PRUNING[pruner])
    good, bad = [0.5, 0.52, 0.54, 0.56, 0.58, 0.6, 0.62, 0.64], [0.02] * 6
    trials = run(spec, good + bad)
    assert [t.state.name for t in trials[: len(good)]] == ["COMPLETE"] * len(good)
    pruned = [t for t in trials[len(good) :] if t.state == TrialState.PRUNED]
    assert len(pruned) >= (3 if pruner == "hyperband" else 6), "hyperband's last bracket prunes nothing"


@pytest.mark.parametrize("beside", [1, 4])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("pruner", PRUNING)
def test_five_trials_end_complete_whatever_the_pruner_and_the_best_of_each_step_are_among_them(
    pruner, maximize, beside
):
    """Each trial is worse than those before it, so that a pruner by itself leaves two or three."""
    options = PRUNING[pruner] | ({"lower": 2.0} if pruner == "threshold" else {})
    spec = SearchSpec(pruner=pruner, **options)

    def completed() -> list[int]:
        queue, made = Queue(spec, mixed(), maximize=maximize), pruners.make_pruner(spec, STEPS)
        sign, ended = 1 if maximize else -1, []
        for first in range(0, 16, beside):
            alive = {i: queue.claim()[0] for i in range(first, first + beside)}
            for step in range(1, STEPS + 1):
                for i, trial_id in alive.items():
                    queue.store.set_trial_intermediate_value(trial_id, step, sign * curve(0.7 - 0.04 * i, step))
                for i, trial_id in list(alive.items()):
                    trial = queue.store.get_trial(trial_id)
                    spared = pruners.is_spared(trial, queue.optuna.trials, spec.min_complete, maximize)
                    if not spared and pruners.should_prune(made, queue.optuna, trial):
                        queue.store.set_trial_state_values(trial_id, TrialState.PRUNED)
                        del alive[i]
            for i, trial_id in alive.items():
                queue.store.set_trial_state_values(trial_id, TrialState.COMPLETE, [sign * curve(0.7 - 0.04 * i, STEPS)])
                ended.append(i)
        return ended

    found = completed()
    assert found[: spec.min_complete] == list(range(spec.min_complete))
    assert found == completed()
    if pruner != "hyperband":  # its last bracket prunes nothing
        assert len(found) < 16, "the pruner still ends the others"


def test_last_trials_that_can_end_complete_are_not_pruned():
    queue = Queue(SearchSpec(), mixed(), maximize=True)
    for number in range(6):
        trial_id, _ = queue.claim()
        queue.store.set_trial_intermediate_value(trial_id, 1, float(number))
        if number:
            queue.store.set_trial_state_values(trial_id, TrialState.FAIL)
    worst = queue.optuna.trials[0]
    assert pruners.is_spared(worst, queue.optuna.trials, 1, maximize=True)
    assert not pruners.is_spared(worst, queue.optuna.trials, 0, maximize=True)


@pytest.mark.parametrize("pruner", ["median", "wilcoxon"])
def test_pruner_waits_for_finished_trials_and_for_min_steps(pruner):
    spec = SearchSpec(pruner=pruner, pruner_startup_trials=3, min_steps=12)
    trials = run(spec, [0.5, 0.01, 0.6, 0.01])
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert trials[-1].last_step >= 12


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("pruner", ["asha", "hyperband"])
def test_trials_that_come_to_a_rung_together_are_judged_against_each_other(pruner, maximize):
    """Hyperband judges each of its brackets so; what it keeps is counted by hand, with the brackets of Optuna."""
    spec = SearchSpec(pruner=pruner, reduction_factor=4, min_steps=1)
    queue, made = Queue(spec, mixed(), maximize=maximize), pruners.make_pruner(spec, STEPS)
    values = [0.3, 0.8, 0.1, 0.2, 0.7, 0.5, 0.6, 0.4, 0.35, 0.85, 0.15, 0.25, 0.75, 0.55, 0.65, 0.45]
    ids = [queue.claim()[0] for _ in values]
    for trial_id, value in zip(ids, values, strict=True):
        for step in (1, 4):
            queue.store.set_trial_intermediate_value(trial_id, step, value)

    def goes_on(i: int) -> bool:
        trial, rungs = queue.store.get_trial(ids[i]), pruners.rungs(spec, STEPS)
        return not pruners.should_prune(made, queue.optuna, trial, rungs)

    found = {i for i in range(len(values)) if goes_on(i)}
    if pruner == "asha":
        brackets = {i: 0 for i in range(len(values))}
    else:
        brackets = {i: made._get_bracket_id(queue.optuna, queue.store.get_trial(ids[i])) for i in range(len(values))}
        assert min(map(list(brackets.values()).count, (0, 1))) >= 4, "or nothing is to be seen"
    expected = set()
    for bracket in set(brackets.values()):
        members = sorted((i for i in brackets if brackets[i] == bracket), key=values.__getitem__, reverse=maximize)
        judged = bracket < 2  # bracket 2 begins at the last step
        expected |= set(members[: max(1, len(members) // 4)] if judged else members)
    assert found == expected, "the best quarter of each rung, the first has no advantage"


def test_trials_of_another_study_do_not_count_for_pruners():
    spec = SearchSpec(pruner="median", pruner_startup_trials=1)
    queue = Queue(spec, mixed(), maximize=True)
    trial_id, _ = queue.claim()
    queue.store.set_trial_user_attr(trial_id, "origin", "outputs/other")
    queue.end(trial_id, 0.9)
    trial_id, _ = queue.claim()
    queue.store.set_trial_intermediate_value(trial_id, 1, 0.1)
    pruner = pruners.make_pruner(spec, STEPS)
    assert not pruners.should_prune(pruner, queue.optuna, queue.store.get_trial(trial_id))


def test_no_pruner_prunes_nothing():
    assert {t.state.name for t in run(SearchSpec(), [0.5, 0.6, 0.0])} == {"COMPLETE"}


def test_rungs_are_where_successive_halving_decides():
    assert pruners.rungs(SearchSpec(pruner="asha"), 160) == {20, 80}
    assert pruners.rungs(SearchSpec(pruner="hyperband", min_steps=3, reduction_factor=3), 100) == {3, 9, 27, 81}
    assert pruners.rungs(SearchSpec(pruner="asha"), 5) == {1, 4}
    assert pruners.rungs(SearchSpec(pruner="asha", min_steps=500), 100) == frozenset()
    assert pruners.rungs(SearchSpec(pruner="median"), 100) == frozenset()


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median", "wilcoxon"])
def test_no_trial_is_compared_inside_its_warm_up_nor_in_its_last_tenth(pruner):
    for total in (5, 15, 60, 246, 1000):
        for warmup_ratio in (0.0, 0.06, 0.2):
            looks = pruners.window(SearchSpec(pruner=pruner), total, warmup_ratio)
            assert looks.start >= max(total / 8, 2 * total * warmup_ratio) and looks.stop - 1 <= 0.9 * total
            assert pruners.rungs(SearchSpec(pruner=pruner), total, warmup_ratio) <= set(looks)
    assert pruners.window(SearchSpec(pruner=pruner, min_steps=3), 100, 0.5).start == 3, "what is asked for counts"


def test_threshold_looks_from_the_first_step_to_the_last_but_one():
    assert pruners.window(SearchSpec(pruner="threshold", lower=0.1), 100, 0.06) == range(100)


@pytest.mark.parametrize("total", [1, 2, 15, 1000])
@pytest.mark.parametrize("pruner", ["asha", "hyperband"])
def test_pruner_takes_any_number_of_steps(pruner, total):
    for least in (None, 1, 2000):
        spec = SearchSpec(pruner=pruner, min_steps=least)
        queue = Queue(spec, mixed())
        trial_id, _ = queue.claim()
        queue.store.set_trial_intermediate_value(trial_id, total, 1.0)
        made = pruners.make_pruner(spec, total)
        assert not pruners.should_prune(made, queue.optuna, queue.store.get_trial(trial_id))
