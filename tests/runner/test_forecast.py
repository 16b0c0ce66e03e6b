"""How long a study will take: its trials' work at the pace that was measured, and in money."""

from types import SimpleNamespace

import pytest
from support.studies import SMALL

from lorasweep.config import compose
from lorasweep.config.spec import SearchSpec
from lorasweep.runner import forecast, preflight, rehearsal, trial_pace
from lorasweep.study.meta import Entry
from lorasweep.training import workload
from lorasweep.training.workload import Pace

ROWS, TOKENS, HELD_OUT = 100, 10, 20
PACE = Pace(start_s=1.0, load_s=2.0, train_s=0.01, step_tokens=100.0, overhead=0.0, eval_s=0.05)


def seconds(*overrides: str, entries: list[Entry] | None = None, pace: Pace = PACE) -> float | None:
    spec = compose.compose_trial(["train.device=cpu", "train.batch_size=10", "train.epochs=2", *overrides])
    examples = {"train": [range(TOKENS)] * ROWS, "eval": [range(TOKENS)] * HELD_OUT}
    loaded = {workload.key(spec): SimpleNamespace(paces={"kind": pace}, examples=examples)}
    entries = entries or [Entry([])]
    each_s = trial_pace.trials_s([spec], loaded, lambda _: "kind", len(entries))
    return forecast.seconds(each_s, entries, spec.search, divided=True)


def test_trial_is_its_start_its_tokens_its_evaluations_and_its_reload():
    trained, evaluated, reloaded = 2 * ROWS * TOKENS * 0.01, 2 * HELD_OUT * 0.05, 2.0 + HELD_OUT * 0.05
    assert seconds() == pytest.approx(1.0 + trained + evaluated + reloaded)
    assert seconds("tracking.reload_check=false") == pytest.approx(1.0 + trained + evaluated)
    assert seconds("train.eval_every=5") == pytest.approx(1.0 + trained + 2 * evaluated + reloaded)
    assert seconds(entries=[Entry()] * 20) == pytest.approx(20 * (seconds() or 0))


def test_head_alone_computes_frozen_layers_once():
    assert seconds("lora.target_modules=[]") == pytest.approx(1.0 + ROWS * TOKENS * 0.01 + HELD_OUT * 0.05 + 2.0 + 1.0)


def test_shared_passes_spare_their_overhead():
    pace = Pace(1.0, 2.0, 0.01, 100.0, 100.0, 0.05)
    alone = seconds("train.slots=1", entries=[Entry([])] * 4, pace=pace)
    shared = seconds("train.slots=4", entries=[Entry([])] * 4, pace=pace)
    assert alone is not None and alone - (shared or 0) == pytest.approx(4 * 2 * ROWS * TOKENS * 0.01 * (1 - 1.25 / 2))


def test_forecast_is_said_with_its_price():
    search = SearchSpec(cost_per_hour=2.5, pruner="median", repeats=2)
    line = "about 2.0 h on this machine, 5.00 at search.cost_per_hour=2.5"
    assert forecast.said(7200.0, search) == f"{line}; less where trials are pruned; repeats come on top"
    assert forecast.said(None, search) == ""


def test_rehearsal_times_each_kind_of_trial(tiny_bert):
    line = [f"model.pretrained={tiny_bert}", *SMALL]
    specs = [compose.compose_trial([*line, *more]) for more in ([], ["lora.r=2"], ["lora.target_modules=[]"])]
    (work,) = preflight.preflight(specs).values()
    assert set(work.paces) == {rehearsal.kind(spec) for spec in specs} and len(work.paces) == 2
    assert all(pace.train_s > 0 and pace.eval_s > 0 for pace in work.paces.values())
    each_s = trial_pace.trials_s(specs, {workload.key(specs[0]): work}, rehearsal.kind, 3)
    total = forecast.seconds(each_s, [Entry([])] * 3, specs[0].search, divided=True)
    assert total is not None and 0 < total < 60
    assert forecast.seconds(each_s, [Entry([])] * 3, SearchSpec(workers=2), divided=False) == pytest.approx(total / 2)
    assert forecast.seconds([*each_s[:2], None], [Entry([])] * 3, specs[0].search, divided=True) is None
