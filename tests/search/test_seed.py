"""search.seed says which points are drawn, on a fast machine and on a slow one."""

from lorasweep.packing import pass_cost
from lorasweep.runner import launch, launchers, plan
from lorasweep.runner.request import Request
from lorasweep.study.study import Study


def test_points_that_a_sampler_draws_do_not_depend_on_what_a_pass_costs_here(tiny_bert, tmp_path, monkeypatch):
    drawn = []
    for name, cost in (("fast", 0.0), ("slow", 1e9)):  # measured slots would be 1 and 8
        monkeypatch.setattr(pass_cost, "overhead", lambda *_, cost=cost: cost)
        words = [
            "search.sampler=tpe",
            "search.trials=7",
            "search.startup_trials=2",
            "search.seed=3",
            "lora.r=interval(2,16)",
            "train.learning_rate=tag(log,interval(1e-4,1e-2))",
            "train.max_steps=2",
            "train.batch_size=4",
            "train.prefix_cache_gib=0",
            "data.max_train_samples=16",
            "data.max_eval_samples=8",
            "data.max_tokens=16",
            f"model.pretrained={tiny_bert}",
            "tracking=none",
            f"outputs={tmp_path}",
            f"study={name}",
        ]
        planned = plan.plan(Request.of(words))
        assert launch.run_study(planned, launchers.here) == 0
        trials = Study.open(tmp_path / name).trials()
        assert [t.state.name for t in trials] == ["COMPLETE"] * 7
        drawn.append([t.user_attrs["swept"] for t in trials])
    assert drawn[0] == drawn[1]
