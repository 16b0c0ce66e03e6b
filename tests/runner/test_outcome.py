"""A saved adapter is tried on some rows of the eval split, in every task."""

import pytest
import torch
from support.parity import TASKS, models, spec_of, trainer, workload_of

from lorasweep.lora import adapter
from lorasweep.runner import outcome
from lorasweep.training import engine

GENERATE = ("task_type.generate=true", "task_type.generate_samples=2", "task_type.max_new_tokens=4")


@pytest.mark.parametrize(("task", "asked"), [*((task, ()) for task in TASKS), ("seq_2_seq_lm", GENERATE)])
def test_saved_adapter_is_told_from_another_by_some_rows(tiny_bert, tiny_llama, tmp_path, monkeypatch, task, asked):
    monkeypatch.setattr(outcome, "RELOADED_ROWS", 4)
    folder, more = models(task, tiny_bert, tiny_llama)
    spec, work = spec_of(task, folder, *more, *asked), workload_of(task, folder, *more, *asked)
    made, jobs = trainer(spec, work), [engine.Job(0, spec)]
    kept = None
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialEnded):
            kept = event.kept
            assert kept is not None
            for primary in kept.metrics:
                adapter.save(event.attached, tmp_path)
                found = outcome.reload(tmp_path, spec, kept, work, made, primary)
                assert found.same, found
                if found.metric is not None:  # few rows may have none
                    assert abs(found.difference) <= 1e-4 * max(1, abs(found.metric)), found
            rows = {p["row"] for p in kept.predictions}
            texts = {p["row"] for p in kept.predictions if "text" in p}
            assert len(texts) == (2 if asked else 0)
            assert len(rows) > 4 and max(2, len(texts)) <= found.rows <= 4 + len(texts)
            with torch.no_grad():
                for parameter in event.attached.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            adapter.save(event.attached, tmp_path)
            assert not outcome.reload(tmp_path, spec, kept, work, made, "loss").same
    assert kept is not None


def test_rows_lie_evenly_in_the_split_and_hold_the_generated_answers():
    predictions = [{"row": row} | ({"text": "yes"} if row == 999 else {}) for row in range(1000)]
    rows = outcome.some_rows([*predictions, {"row": 0}], 100)
    assert rows == {*range(0, 1000, 10), 999}
    assert outcome.some_rows(predictions[:50], 100) == set(range(50))
