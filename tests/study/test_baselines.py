"""Baselines stand beside the best trial, in table, report and answer, and never among those that are chosen from."""

import json
import re

import pytest
import torch
from support import parity
from support.studies import SMALL, SPACE, end, study_of

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.models import base_model
from lorasweep.report import study_data, tables
from lorasweep.runner import preflight
from lorasweep.search.study_view import searched
from lorasweep.study import answer, baselines, wording
from lorasweep.study.meta import Entry
from lorasweep.study.study import Study
from lorasweep.tasks.batches import epochs
from lorasweep.training import engine


def test_baseline_keeps_what_trials_share_but_for_the_adapter():
    fixed = ["task_type=seq_cls", "lora.r=4", "lora=attention", "train.learning_rate=2e-3", "train.epochs=2"]
    spec = compose.compose_trial(fixed)
    shared = ["task_type=seq_cls", "train.epochs=2"]
    assert {*baselines.overrides("base", fixed, spec)} == {*shared, "train.learning_rate=2e-3", "train.max_steps=0"}
    head = [*shared, "train.learning_rate=0.02", "lora.target_modules=[]"]
    assert sorted(baselines.overrides("head", fixed, spec)) == sorted(head)
    full = compose.compose_trial(baselines.overrides("full", fixed, spec))
    assert full.lora.full and full.train.learning_rate == pytest.approx(2e-4)


def test_rate_by_the_rule_is_multiplied():
    fixed = ["train.learning_rate=auto", "train.lr_multiple=2"]
    made = compose.compose_trial(baselines.overrides("full", fixed, compose.compose_trial(fixed)))
    assert (made.train.learning_rate, made.train.lr_multiple) == ("auto", pytest.approx(0.2))


@pytest.fixture
def compared(tmp_path, few_resamples) -> Study:
    study = study_of(tmp_path, [2, 4])
    beside = [Entry(SPACE.line({"lora.r": 8}), {"baseline": n}, baseline=n) for n in ("head", "full")]
    study.queue.enqueue(beside)
    for value, trainable in ((0.8, 100), (0.82, 200), (0.7, 50), (0.9, 6600)):
        end(study, value, trainable=trainable)
    return study


def test_best_is_of_the_search_and_is_compared_with_the_baselines(compared):
    found = answer.answer(compared)
    assert found.best is not None and found.best.number == 1 and len(found.candidates) == 2
    assert [(b.name, b.number, b.value) for b in found.baselines] == [("head", 2, 0.7), ("full", 3, 0.9)]
    head, full = (b.interval for b in found.baselines)
    assert head is not None and head.low < 0.12 < head.high and full is not None and full.high < 0
    said = wording.text(found)
    assert "Trial 1 (lora.r=4) is 0.1200 better than a head alone (trial 2, 0.7000, 95 % " in said
    assert re.search(r"0\.0800 worse than full fine-tuning .*, which trains 33 times the parameters\.", said)


def test_baselines_stand_in_the_table_with_their_names_and_not_in_the_ranking(compared):
    data = study_data.gather(compared)
    assert [t.number for t in data.ranked("COMPLETE")] == [1, 0]
    states = [row[1] for row in tables.leaders(data).rows]
    assert states == ["finished", "finished", "finished, a head alone", "finished, full fine-tuning"]
    assert [t.number for t in searched(compared.trials())] == [0, 1]


def test_full_fine_tuning_trains_all_and_leaves_the_base_as_it_was(tiny_bert, tied_llama):
    for task, folder in (("seq_cls", tiny_bert), ("causal_lm", tied_llama)):
        spec = parity.spec_of(task, folder, "lora.target_modules=[]", "lora.full=true", "train.max_steps=3")
        work = parity.workload_of(task, folder)
        made = parity.trainer(spec, work)
        before = {n: p.clone() for n, p in made.base.model.named_parameters()}
        seen = parity.run(made, [engine.Job(0, spec)], 1)[0]
        moved = {n: t for n, t in seen.tensors.items() if not torch.equal(t, before.get(_plain(n), t * 0))}
        assert len(seen.tensors) >= len(before) and len(moved) >= 0.8 * len(before)
        after = dict(made.base.model.named_parameters())
        heads = tuple(f"{m}." for m in made.base.missing)
        assert all(torch.equal(after[n], p) for n, p in before.items() if not n.startswith(heads))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def test_full_fine_tuning_is_trainers_without_an_adapter(tiny_bert):
    """The first loss after one step of plain AdamW on all weights."""
    more = ("lora.target_modules=[]", "lora.full=true", "train.max_steps=2", "train.max_grad_norm=0")
    spec = parity.spec_of("seq_cls", tiny_bert, *more, "train.warmup_ratio=0", "train.lr_scheduler_type=constant")
    work = parity.workload_of("seq_cls", tiny_bert)
    seen = parity.run(parity.trainer(spec, work), [engine.Job(0, spec)], 1)[0]
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    base_model.renew_missing(base, spec.train.seed)
    model = base.model.requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.learning_rate, weight_decay=0.0)
    batches, losses = epochs(work.examples["train"], spec.train.batch_size, spec.train.seed), []
    for _ in range(2):
        batch = work.task.collate([next(batches)], work.tokenizer.pad_token_id)
        loss = work.task.row_losses(model, batch).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen.losses == pytest.approx(losses, abs=1e-5)


def test_baselines_run_beside_a_sweep(tiny_bert, tiny_llama, tmp_path, capsys):
    own = [*SMALL, f"outputs={tmp_path}", "tracking=none"]
    words = ["-m", "lora.r=2,4", f"model.pretrained={tiny_bert}", "search.baselines=[head,full]", "study=a", *own]
    assert main.main(["check", *words]) == 0
    planned = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in planned if row[0].isdigit()] == [["0", "2"], ["1", "4"], ["2", "head"], ["3", "full"]]
    assert any(row[0].startswith("time:") and "on this machine" in row[0] for row in planned)
    assert main.main(words) == 0
    study = Study.open(tmp_path / "a")
    assert [t.user_attrs.get("baseline") for t in study.trials()] == [None, None, "head", "full"]
    results = [json.loads((tmp_path / "a" / str(n) / "result.json").read_text()) for n in range(4)]
    trained = [r["params"]["trainable"] for r in results]
    assert trained[2] < trained[0] < trained[1] < trained[3] <= results[3]["params"]["total"]
    assert results[2]["reload"]["same"] and not (tmp_path / "a" / "3" / "adapter").exists()
    assert "a head alone (trial 2" in capsys.readouterr().out
    lm = ["task_type=causal_lm", f"model.pretrained={tiny_llama}", "search.baselines=[base]", "study=b"]
    assert main.main(["-m", "lora.r=2,4", *lm, *own]) == 0
    base = json.loads((tmp_path / "b" / "2" / "result.json").read_text())
    assert (base["params"]["trainable"], base["steps"]) == (0, 0) and base["metric"]["value"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.baselines=[base]"], "search.baselines: base: the classifier of .* is new and answers by chance"),
        (["search.baselines=[head]", "task_type=causal_lm"], "an empty list adapts nothing.*leave head out"),
        (["search.baselines=[full]"], "search.baselines: full: to train every weight needs about"),
    ],
)
def test_baseline_that_means_nothing_here_is_refused(tiny_bert, tiny_llama, overrides, words, monkeypatch):
    monkeypatch.setattr(preflight.estimate, "free_gib", lambda device: 1e-3)
    folder = tiny_llama if "task_type=causal_lm" in overrides else tiny_bert
    line = [f"model.pretrained={folder}", *SMALL, *overrides]
    spec = compose.compose_trial(line)
    (name,) = spec.search.baselines
    with pytest.raises(ConfigError, match=words):
        preflight.preflight([compose.compose_trial(baselines.overrides(name, line, spec))])
