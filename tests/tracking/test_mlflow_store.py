"""MLflow as a mirror: it may be down, slow, restarted or shared, and the folder's points arrive in it once each."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from support.mlflow_server import Server, free_port, in_file, in_mlflow, remembered
from support.tracked_runs import TAGS, VALUES, made, runs_in, start, write

from lorasweep.config import compose
from lorasweep.credentials import tracking_uri
from lorasweep.study.meta import STUDY, StudyMeta, write_meta
from lorasweep.study.result import RESULT, Metric, TrialResult, write_result
from lorasweep.tracking import outbox, runs

ROWS = SimpleNamespace(name="rows", fingerprint="f" * 64, splits={"train": [1, 2], "eval": [3]})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def store(new_store, tmp_path) -> str:
    """Return the URI of the default store, a copy that processes of a test's own find, too."""
    shutil.copy(new_store(), tmp_path)
    return runs.default_uri(str(tmp_path))


@pytest.fixture(autouse=True)
def quick_breaker(monkeypatch):
    monkeypatch.setattr("lorasweep.tracking.sender.RETRY_S", 0.5)
    monkeypatch.setattr("lorasweep.tracking.sender.PUSH_S", 0.05)


TESTS = Path(__file__).resolve().parents[1]
PRELUDE = """
import os, sys, time
from pathlib import Path
from lorasweep.tracking import runs
from support.tracked_runs import made, start, write
"""


def in_process(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)


def test_killed_server_stops_nothing_and_sync_sends_the_rest_once(server, tmp_path, caplog):
    spec = made(tmp_path, server.uri)
    parent = runs.open_study(spec, "s", "`command`")
    assert parent
    run = start(spec, parent)
    run.params(spec, {"lora.r": 8})
    run.dataset(ROWS, spec)
    write(run, 1, 5)
    run.covered(5)
    assert runs.flush() == 0
    assert len(in_mlflow(server.uri, tmp_path / "s/0")) == 25

    server.kill()
    caplog.clear()
    write(run, 6, 10)
    (tmp_path / "s/0/log.txt").write_text("done")
    run.artifact(tmp_path / "s/0/log.txt")
    run.tag("state", "COMPLETE")
    run.close("FINISHED")
    late = start(spec, parent, 1)
    write(late, 1, 3)
    late.close("FAILED")
    assert len(caplog.records) == 1, caplog.text
    assert len(in_file(tmp_path / "s/0")) == 50
    assert [remembered(tmp_path / f"s/{i}").behind for i in range(2)] == [True, True]

    server.start()
    counts = runs.sync(tmp_path / "s", spec)
    assert (counts.runs, counts.sent, counts.failed) == (3, 2, 0), counts
    assert counts.points == 25 + 15
    assert runs.sync(tmp_path / "s", spec).points == 0
    for number, status in enumerate(["FINISHED", "FAILED"]):
        folder = tmp_path / f"s/{number}"
        assert in_mlflow(server.uri, folder) == in_file(folder)
        found = MlflowClient(server.uri).get_run(remembered(folder).run_id)
        assert found.info.status == status
        assert found.info.end_time == remembered(folder).ended_ms
        assert found.data.tags["mlflow.parentRunId"] == parent
    first = MlflowClient(server.uri).get_run(remembered(tmp_path / "s/0").run_id)
    assert first.data.params["lora.r"] == "8"
    assert first.data.tags["state"] == "COMPLETE"
    assert first.inputs.dataset_inputs[0].dataset.digest == "f" * 32
    assert [a.path for a in MlflowClient(server.uri).list_artifacts(first.info.run_id)] == ["log.txt"]
    assert len(runs_in(server.uri)) == 3

    runs.close_study(spec, parent, {"test_accuracy": 0.75}, ok=True)
    study = MlflowClient(server.uri).get_run(parent)
    assert (study.info.status, study.data.metrics) == ("FINISHED", {"test_accuracy": 0.75})
    again = runs.sync(tmp_path / "s", spec)
    assert (again.sent, again.points, again.open) == (0, 0, 0)


def test_study_begun_without_its_server_is_made_whole_later(tmp_path, store, caplog):
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert runs.open_study(made(tmp_path, nowhere), "s", "`command`") is None
    run = start(made(tmp_path, nowhere), None)
    write(run, 1, 3)
    run.close("FINISHED")
    runs.close_study(made(tmp_path, nowhere), None, {"best": 1.0}, ok=True, folder=tmp_path / "s")
    assert len(caplog.records) == 1, caplog.text

    counts = runs.sync(tmp_path / "s", store)
    assert (counts.sent, counts.points, counts.problem) == (2, 16, "")
    study, trial = sorted(runs_in(store), key=lambda r: r.data.tags["kind"])
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert study.data.metrics == {"best": 1.0}
    assert runs.sync(tmp_path / "s", store).sent == 0
    assert in_mlflow(store, tmp_path / "s/0") == in_file(tmp_path / "s/0")


def test_server_that_never_answers_costs_training_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        run = start(made(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}"), None)
        spent: list[float] = []
        for step in range(1, 1501):
            before = time.perf_counter()
            run.metrics(step, VALUES)
            run.covered(step)
            spent.append(time.perf_counter() - before)
        began = time.perf_counter()
        run.close("FINISHED")
        closed = time.perf_counter() - began
    thirds = [sum(spent[i : i + 500]) for i in (0, 500, 1000)]
    assert min(thirds) / 500 < 0.001, thirds  # other tests may take the machine for a while
    assert max(spent) < 1
    assert closed < runs.CLOSE_S + 1
    assert len(in_file(tmp_path / "s/0")) == 7500
    assert remembered(tmp_path / "s/0").behind
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1, caplog.text


def test_five_metrics_a_step_cost_under_a_millisecond(tmp_path, store):
    spec = made(tmp_path)
    run = start(spec, runs.open_study(spec, "s", "`command`"))
    runs.flush()
    began = time.process_time()
    for step in range(1, 2001):
        run.metrics(step, VALUES)
    assert (time.process_time() - began) / 2000 < 0.001
    run.close("FINISHED")
    assert len(in_mlflow(store, tmp_path / "s/0")) == 10_000


KILLED = """
spec = made(Path(sys.argv[1]))
run = start(spec, runs.open_study(spec, "s", "`command`"))
write(run, 1, 10)
run.covered(4)
assert runs.flush() == 0
with (Path(sys.argv[1]) / "s/0/metrics.jsonl").open("a") as file:
    file.write('{"step": 11, "time')
os.kill(os.getpid(), 9)
"""


@pytest.mark.integration
def test_resumed_trial_goes_on_in_its_run_and_doubles_nothing(tmp_path, store):
    spec, folder = made(tmp_path), tmp_path / "s/0"
    killed = in_process(KILLED, tmp_path)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()[1]
    run_id = remembered(folder).run_id
    assert max(step for _, step, _ in in_mlflow(store, folder)) == 4
    waiting = runs.sync(tmp_path / "s", spec)
    assert (waiting.sent, waiting.points, waiting.open) == (0, 0, 2)
    assert {r.info.status for r in runs_in(store)} == {"RUNNING"}

    run = start(spec, remembered(tmp_path / "s").run_id, from_step=4)
    assert max(step for _, step, _ in in_file(folder)) == 4
    write(run, 5, 10, value=0.25)
    run.close("KILLED")
    assert runs.flush() == 0 and run.run_id == run_id
    assert in_mlflow(store, folder) == in_file(folder)

    older = start(spec, None, from_step=2)  # the checkpoint of step 4 was lost
    write(older, 3, 12, value=0.25)
    older.covered(12)
    runs.flush()
    assert MlflowClient(store).get_run(run_id).info.status == "RUNNING"
    older.close("FINISHED")
    steps = Counter((k, s) for k, s, _ in in_mlflow(store, folder).elements())
    assert steps == Counter((k, s) for k, s, _ in in_file(folder).elements())
    assert len([r for r in runs_in(store) if r.data.tags["kind"] == "trial"]) == 1


def result(**known) -> TrialResult:
    """Return the result of trial 0, which has reached an f1 of 0.25."""
    ours = {"number": 0, "state": "COMPLETE", "reason": "", "overrides": [], "params_swept": {}}
    return TrialResult(**ours | known, metric=Metric(name="f1", value=0.25, maximize=True))


@pytest.mark.parametrize(("state", "status"), [("COMPLETE", "FINISHED"), ("PRUNED", "FINISHED"), ("FAIL", "FAILED")])
def test_trial_killed_after_its_result_is_ended_by_sync(tmp_path, store, state, status):
    spec, folder = made(tmp_path), tmp_path / "s/0"
    folder.mkdir(parents=True)
    note = outbox.Ledger(experiment="lorasweep", name="0", tags=dict(TAGS))
    note.save(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "time_ms": 5, "loss": 1.0}\n{"step": 2, "ti')
    assert runs.sync(tmp_path / "s", spec).open == 1
    write_result(folder, result(state=state, reason="so"))
    assert runs.sync(tmp_path / "s", spec).sent == 1
    (run,) = runs_in(store)
    assert (run.info.status, run.data.tags["state"], run.data.tags["reason"]) == (status, state, "so")
    assert run.data.tags["metric"] == "f1"
    assert [a.path for a in MlflowClient(store).list_artifacts(run.info.run_id)] == ["result.json"]
    assert in_mlflow(store, folder) == Counter([("loss", 1, 1.0), (outbox.OBJECTIVE, 0, 0.25)])


def test_description_of_a_study_holds_question_answer_and_rerun_line(tmp_path, store):
    spec, folder = made(tmp_path), tmp_path / "s/0"
    parent = runs.open_study(spec, "s", "Which rank?")
    run = start(spec, parent)
    rerun = "python -m lorasweep lora.r=8"
    write_result(folder, result(rerun=rerun, params_swept={"lora.r": 8}))
    run.close("FINISHED")
    meta = StudyMeta(
        name="s",
        question="Which rank?",
        metric="f1",
        overrides=["lora.r=8,16"],
        swept=["lora.r"],
        maximize=True,
        created="2026-01-01T00:00:00+0000",
    )
    write_meta(tmp_path / "s", meta)
    scores = {"best_trial": 0, "best_eval_f1": 0.25, "test_f1": 0.125}
    runs.close_study(spec, parent, scores, ok=True, folder=tmp_path / "s", answer="Trial 0 is best.")
    client = MlflowClient(store)
    note = client.get_run(parent).data.tags[outbox.NOTE]
    assert "**Question**: Which rank?" in note
    assert f"**Answer**: Trial 0 is best.\n\n**Best run**: [trial 0](#/runs/{run.run_id})" in note
    assert f"`{rerun}`" in note
    assert "python -m lorasweep report outputs/s`" in note
    assert rerun in client.get_run(run.run_id).data.tags[outbox.NOTE]
    experiment = client.get_experiment_by_name("lorasweep")
    assert f"[s](#/runs/{parent})" in experiment.tags[outbox.NOTE]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    saved = json.loads(experiment.tags[f"mlflow.sharedViewState.{parent}"])
    view = json.loads(saved["state"])
    assert saved["name"] == "s: trials, best first"
    assert view["selectedColumns"][:2] == ["metrics.`objective`", "params.`lora.r`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`objective`", False)
    found = client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert [r.info.run_id for r in found] == [run.run_id]


def test_study_over_lists_of_400_modules_is_told_in_full_length_nowhere_but_in_its_files(tmp_path, store):
    names = ",".join(f"bert.encoder.layer.{i}.attention.self.query" for i in range(400))
    overrides = [f"lora.target_modules=[{names}],[{names},classifier]"]
    spec, folder = made(tmp_path), tmp_path / "s/0"
    parent = runs.open_study(spec, "s", "`command`")
    run = start(spec, parent)
    rerun = f"python -m lorasweep {overrides[0]}"
    write_result(folder, result(rerun=rerun, params_swept={"lora.target_modules": f"[{names}]"}))
    run.close("FINISHED")
    meta = StudyMeta(
        name="s",
        metric="f1",
        maximize=True,
        overrides=overrides,
        swept=["lora.target_modules", *(f"key.number{i}" for i in range(1000))],
        created="2026-01-01T00:00:00+0000",
    )
    write_meta(tmp_path / "s", meta)
    runs.close_study(spec, parent, {"best_trial": 0}, ok=True, folder=tmp_path / "s", answer="Trial 0 is best.")
    client = MlflowClient(store)
    note = client.get_run(parent).data.tags[outbox.NOTE]
    assert STUDY in note and RESULT in note and "**Compare**" in note
    assert len(note) < 4000
    experiment = client.get_experiment_by_name("lorasweep")
    assert note in experiment.tags[outbox.NOTE]
    saved = json.loads(experiment.tags[f"mlflow.sharedViewState.{parent}"])
    assert "params.`lora.target_modules`" in json.loads(saved["state"])["selectedColumns"]
    assert json.loads((folder / RESULT).read_text())["rerun"] == rerun


def test_run_whose_creation_was_not_answered_is_found_again(tmp_path, store):
    spec, folder = made(tmp_path), tmp_path / "s/0"
    run = start(spec, None)
    write(run, 1, 2)
    run.close("FINISHED")
    note = remembered(folder)
    note.run_id, note.behind = None, True
    note.save(folder)
    assert runs.sync(tmp_path / "s", spec).points == 0
    assert len(runs_in(store)) == 1
    assert in_mlflow(store, folder) == in_file(folder)


def test_trial_taken_over_by_another_process_is_let_go(tmp_path, store):
    spec, folder = made(tmp_path), tmp_path / "s/0"
    lost = start(spec, None)
    write(lost, 1, 4)
    lost.covered(2)
    runs.flush()
    other = start(spec, None, from_step=2)  # waits until the first one lets go
    lost.leave()
    write(other, 3, 4, value=0.25)
    other.close("FINISHED")
    assert not remembered(folder).behind
    assert in_mlflow(store, folder) == in_file(folder)
    assert len(runs_in(store)) == 1


def test_study_copied_to_another_store_arrives_whole(tmp_path, store):
    spec = made(tmp_path)
    run = start(spec, runs.open_study(spec, "s", "`command`"))
    write(run, 1, 3)
    run.close("FINISHED")
    runs.close_study(spec, run.run_id, {"best": 1.0}, ok=True, folder=tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy/s")
    other = runs.default_uri(str(tmp_path / "copy"))
    assert runs.sync(tmp_path / "copy/s", other).sent == 2
    assert runs.sync(tmp_path / "copy/s", other).sent == 0
    assert in_mlflow(other, tmp_path / "copy/s/0") == in_file(tmp_path / "s/0") == in_mlflow(store, tmp_path / "s/0")
    study, trial = sorted(runs_in(other), key=lambda r: r.data.tags["kind"])
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id


def test_run_deleted_in_mlflow_is_left_alone(tmp_path, store, caplog):
    spec = made(tmp_path)
    run = start(spec, None)
    runs.flush()
    MlflowClient(store).delete_run(run.run_id)
    write(run, 1, 2)
    run.close("FINISHED")
    counts = runs.sync(tmp_path / "s", spec)
    assert (counts.failed, counts.sent) == (1, 0)
    assert "deleted" in counts.problem
    assert len(caplog.records) == 1, caplog.text
    assert len(in_file(tmp_path / "s/0")) == 10


MANY = """
spec = made(Path(sys.argv[1]))
for i in range(8):
    run = start(spec, sys.argv[2], 100 * int(sys.argv[3]) + i)
    run.params(spec, {})
    for step in range(1, 6):
        write(run, step, step)
        run.covered(step)
    run.close("FINISHED")
while runs.flush():  # a busy machine is no error
    pass
"""


@pytest.mark.integration
def test_four_processes_share_a_sqlite_store_without_a_loss(tmp_path, store):
    spec = made(tmp_path)
    parent = runs.open_study(spec, "s", "`command`")
    writers = [in_process(MANY, tmp_path, parent, i) for i in range(1, 5)]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
        assert "locked" not in errors
    folders = [p.parent for p in (tmp_path / "s").glob("*/mlflow.json")]
    assert len(folders) == 32
    assert not any(remembered(f).behind for f in folders)
    assert len(runs_in(store, "FINISHED")) == 32
    for folder in folders[::4]:
        assert in_mlflow(store, folder) == in_file(folder)


def test_password_of_the_store_is_written_nowhere(tmp_path, caplog):
    uri = f"http://someone:hunter2@127.0.0.1:{free_port()}"
    spec = made(tmp_path, uri)
    runs.open_study(spec, "s", f"`python -m lorasweep tracking.uri={uri}`")
    run = start(spec, None)
    run.params(spec, {"tracking.uri": uri})
    run.tag("reason", f"no answer from {uri}?password=hunter2")
    run.close("FINISHED")
    left = "".join(p.read_text() for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert "127.0.0.1" in left
    assert "127.0.0.1" in caplog.text
    assert "hunter2" not in left + caplog.text + str(runs.sync(tmp_path / "s", spec))


@pytest.mark.parametrize(("step", "kept"), [(None, [0, 1, 2, 3]), (0, []), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_points_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "time_ms": 1, "loss": 1.0}}\n' for i in range(4)) + '{"step": 4, "los')
    outbox.drop_after(path, step)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept


def test_without_tracking_only_the_file_is_written(tmp_path):
    spec = compose.compose_trial([f"outputs={tmp_path}", "tracking=none"])
    assert runs.open_study(spec, "s", "") is None
    run = start(spec, None)
    write(run, 1, 2)
    run.params(spec, {})
    run.close("FINISHED")
    assert [p.name for p in (tmp_path / "s/0").iterdir()] == ["metrics.jsonl"]


def test_credentials_of_a_server_go_to_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    kept = tracking_uri("http://me:s%40cret@host:5000")
    assert kept == "http://host:5000"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "s@cret")
    assert tracking_uri("http://host:5000") == "http://host:5000"
