"""The queue: who gets a trial, what a death leads to, what survives a torn journal; the same over every storage."""

import errno
import json
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorasweep.config.spec import SearchSpec
from lorasweep.credentials import database_url, without_password
from lorasweep.errors import ConfigError, LostLease, StorageDown
from lorasweep.hardware import container
from lorasweep.search import space
from lorasweep.study import lease, storage
from lorasweep.study.meta import Entry, StudyMeta, read_meta
from lorasweep.study.study import Study
from lorasweep.study.trial import Trial

SPACE, _ = space.read(["lora.r=2,4,8", "train.learning_rate=tag(log,interval(1e-4,1e-2))", "train.epochs=1"])


def meta(name: str, **search) -> StudyMeta:
    url = search.pop("storage", None)
    return StudyMeta(
        name=name,
        swept=SPACE.keys,
        overrides=[],
        metric="accuracy",
        maximize=True,
        created="",
        space=SPACE.describe(),
        search=asdict(SearchSpec(**{"sampler": "random"} | search)),
        storage=url,
    )


@pytest.fixture(params=["journal", pytest.param("postgres", marks=pytest.mark.slow)])
def make(request, tmp_path):
    """Return a function that makes a study of blanks in one of the storages."""
    url = request.getfixturevalue("postgres") if request.param == "postgres" else None

    def made(trials: int = 3, **search) -> Study:
        name = f"s{time.monotonic_ns()}"
        return Study.create(tmp_path / name, meta(name, storage=url, **search), [Entry()] * trials)

    return made


def other(study: Study) -> Study:
    return Study.open(study.folder)


def claim(study: Study) -> Trial | None:
    number = study.claim()
    return None if number is None else study.drawn(number)


def bury(study: Study, number: int) -> None:
    """Let the owner of a trial be a process that is no more."""
    name = study._store.optuna.get_trial(study.queue._ids[number]).user_attrs["owner"]["name"]
    dead = lease.me().to_dict() | {"pid": 2**22 - 1, "name": name}
    study._store.optuna.set_trial_user_attr(study.queue._ids[number], "owner", dead)


def test_each_trial_is_claimed_once_and_drawn_in_the_space(make):
    study = make(4)
    claimed = [claim(worker) for worker in (study, other(study), study, other(study), study)]
    assert [c.number if c else None for c in claimed] == [0, 1, 2, 3, None]
    for trial in study.trials():
        assert set(trial.params) == {"lora.r", "train.learning_rate"}
        assert trial.user_attrs["overrides"][0] == "train.epochs=1"
        assert f"lora.r={trial.params['lora.r']}" in trial.user_attrs["overrides"]
    assert len({t.params["train.learning_rate"] for t in study.trials()}) == 4


def test_threads_are_divided_among_all_while_trials_wait_then_among_those_that_hold_one(make):
    first = make(3, workers=3)
    second = other(first)
    claim(first)
    claim(second)
    assert first.sharing() == 3
    claim(second)
    assert first.sharing() == second.sharing() == 2
    for number in (1, 2):
        second.queue.tell(number, "COMPLETE", [0.5], {})
    assert first.sharing() == 1
    assert second.sharing() == 2, "it and the other one"


def _claim_all(folder: Path, answer) -> None:
    study, mine = Study.open(folder), []
    while (claimed := claim(study)) is not None:
        mine.append(claimed.number)
        study.queue.tell(claimed.number, "COMPLETE", [0.5], {})
    answer.put(mine)


@pytest.mark.integration
def test_four_processes_claim_no_trial_twice(make):
    study = make(60)
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    processes = [spawn.Process(target=_claim_all, args=(study.folder, answer)) for _ in range(4)]
    for process in processes:
        process.start()
    claimed = [number for _ in processes for number in answer.get(timeout=120)]
    for process in processes:
        process.join()
    assert Counter(claimed) == Counter(range(60))


def test_trial_of_a_dead_owner_goes_back_and_keeps_its_point(make):
    study, heir = make(1), None
    first = claim(study)
    heir = other(study)
    assert heir.owners.reclaim(heir.search.max_retries) == [] and claim(heir) is None  # the owner lives
    bury(study, 0)
    assert heir.owners.reclaim(heir.search.max_retries) == []
    again = claim(heir)
    assert again is not None and (again.number, again.spec) == (0, first.spec)


def test_owner_thought_dead_may_neither_save_nor_tell(make):
    study = make(1)
    claim(study)
    bury(study, 0)
    heir = other(study)
    heir.owners.reclaim(heir.search.max_retries)
    claim(heir)
    with pytest.raises(LostLease):
        study.queue.checkpointed(0, 5)
    with pytest.raises(LostLease):
        study.queue.tell(0, "COMPLETE", [0.9], {})
    heir.queue.tell(0, "COMPLETE", [0.5], {})
    assert study.trial(0).values == [0.5]


def test_only_deaths_without_progress_count(make):
    study = make(1, max_retries=1)
    for step in (5, 10, 15):
        claim(study)
        study.queue.checkpointed(0, step)
        bury(study, 0)
        assert study.owners.reclaim(study.search.max_retries) == []
    for step in (16, 17, 18):  # killed before the next checkpoint, but further than the time before
        claim(study)
        study.signals.beat({0: {"step": step}}, 1.0, 0.0)
        bury(study, 0)
        assert study.owners.reclaim(study.search.max_retries) == []
    assert study.trial(0).user_attrs["deaths"] == 0
    for given_up in ([], [0]):
        claim(study)
        study.signals.beat({0: {"step": 18}}, 1.0, 0.0)
        bury(study, 0)
        assert study.owners.reclaim(study.search.max_retries) == given_up
    assert study.trial(0).state.name == "FAIL"
    assert "died 2 times without getting further than step 18" in study.trial(0).user_attrs["reason"]


def test_trial_that_waited_while_others_ran_is_not_to_blame(make):
    study = make(2, max_retries=0)
    claim(study), claim(study)
    study.signals.beat({0: {"step": 1}}, 1.0, 0.0)
    bury(study, 1)
    assert study.owners.reclaim(study.search.max_retries) == []
    assert "deaths" not in study.trial(1).user_attrs


def test_trial_for_which_the_kernel_kills_twice_fails_and_says_why(make, monkeypatch):
    study = make(1, max_retries=9)
    for count, given_up in ((1, []), (2, [0])):
        claim(study)
        study.signals.beat({0: {"step": 0}}, 1.0, 0.0)
        monkeypatch.setattr(container, "oom_kills", lambda count=count: count)
        bury(study, 0)
        assert study.owners.reclaim(study.search.max_retries) == given_up
    assert study.trial(0).user_attrs["reason"] == "out of memory: the kernel killed its worker 2 times at step 0"


def test_owner_on_another_machine_dies_when_its_beat_stands_still(monkeypatch):
    watch, clock = lease.Watch(0.2), iter((100.0, 100.15, 100.3, 100.45))
    far = lease.me().to_dict() | {"host": "elsewhere"}
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert [watch.dead(far, beat) for beat in (1, 2, 2, 2)] == [False, False, False, True]


def test_pid_that_came_back_is_another_process():
    mine = lease.me().to_dict()
    assert not lease.Watch(1).dead(mine, 0)
    assert lease.Watch(1).dead(mine | {"born": mine["born"] - 100}, 0)


def test_trial_with_a_result_is_told_and_never_failed(make):
    study = make(1, max_retries=0)
    claim(study)
    study.trial_folder(0).mkdir()
    (study.trial_folder(0) / "result.json").write_text("{}")
    bury(study, 0)
    assert study.owners.reclaim(study.search.max_retries) == []
    assert study.trial(0).state.name == "WAITING"


def test_claim_whose_answer_was_lost_is_taken_up(make):
    study = make(3)
    assert study.claim() == 0
    del study.queue._ids[0]  # as if the answer had not come
    assert study.claim() == 0
    study.drawn(0)
    assert study.claim() == 1


def test_told_twice_is_told_once(make):
    study = make(1)
    claim(study)
    study.queue.tell(0, "COMPLETE", [0.5], {})
    study.queue.tell(0, "COMPLETE", [0.5], {})
    with pytest.raises(LostLease):
        study.queue.tell(0, "PRUNED", None, {})


def test_verdict_of_the_pruner_outlives_its_worker(make):
    study = make(1)
    claim(study)
    study.queue.condemn(0, "asha: too slow")
    bury(study, 0)
    heir = other(study)
    heir.owners.reclaim(heir.search.max_retries)
    claim(heir)
    assert heir.queue.verdict(0) == "asha: too slow"


def test_target_of_a_loss_is_reached_from_above(tmp_path):
    from dataclasses import replace

    lower = replace(meta("loss", target=0.5), maximize=False)
    study = Study.create(tmp_path / "loss", lower, [Entry()] * 3)
    for value, spent in ((0.6, False), (0.5, True)):
        number = study.claim()
        study.drawn(number)
        study.queue.tell(number, "COMPLETE", [value], {})
        assert bool(study.spent()) is spent


def test_added_trial_goes_first(make):
    study = make(3)
    study.queue.enqueue([Entry(["train.epochs=1", "lora.r=64"], {"lora.r": 64}, added=True)])
    claimed = claim(study)
    assert claimed is not None and claimed.number == 3
    assert claimed.swept(study.space)["lora.r"] == claimed.spec.lora.r == 64
    assert study.trial(3).params == {}  # 64 lies outside: the sampler is not told


def test_recipe_keeps_its_values_and_the_sampler_gives_the_rest(make):
    study = make(0)
    study.queue.enqueue([Entry(given={"lora.r": 8}, extra=["lora.lora_dropout=0.3"])])
    claimed = claim(study)
    assert claimed is not None and claimed.spec.lora.r == 8
    assert claimed.spec.lora.lora_dropout == 0.3
    assert 1e-4 <= claimed.spec.train.learning_rate <= 1e-2


@pytest.mark.parametrize(
    ("budget", "words"),
    [({"target": 0.5}, "target=0.5"), ({"device_hours": 1.0}, "device_hours=1"), ({"wall_hours": 0.001}, "wall_hours")],
)
def test_no_trial_begins_once_a_budget_is_used_up(make, budget, words):
    study = make(2, **budget)
    study.begin()
    claim(study)
    study.queue.tell(0, "COMPLETE", [0.7], {"device_s": 3700.0})
    study._optuna.set_user_attr("began", time.time() - 3700)
    assert claim(study) is None
    assert words in study.spent()
    assert study.queue.waiting() == 1


def test_stops_are_told_and_forgotten_at_the_next_start(make):
    study = make(2)
    study.signals.stop(1, "slow")
    study.signals.stop(None, "Ctrl-C")
    assert other(study).signals.stops() == {"1": "slow", "all": "Ctrl-C"}
    study.begin()
    assert study.signals.stops() == {"1": "slow"}
    assert study.queue.end_waiting(1, "not needed")
    assert study.trial(1).state.name == "PRUNED"
    claim(study)
    assert not study.queue.end_waiting(0, "too late")


def test_ended_trials_of_another_study_count_where_they_lie_in_the_space(make):
    old = make(2)
    for value in (0.1, 0.2):
        claimed = claim(old)
        old.queue.tell(claimed.number, "COMPLETE", [value], {})
    outside = old.queue.enqueue([Entry(["lora.r=64"], {"lora.r": 64})])[0]
    claim(old)
    old.queue.tell(outside, "COMPLETE", [0.9], {})
    new = make(1)
    assert len(new.queue.take_in(old.trials(), origin="old")) == 2
    assert len(new.trials()) == 1 and new.best() is None
    assert len(new._optuna.get_trials()) == 3


def test_study_of_that_name_is_refused(make):
    study = make(1)
    with pytest.raises(ConfigError, match=r"is there already.*resume"):
        Study.create(study.folder, study.meta, [])


def test_second_machine_joins_by_url(make, tmp_path):
    study = make(2)
    if study.meta.storage is None:
        pytest.skip("a journal has no URL")
    joined = Study.join(study.meta.storage, study.meta.name, tmp_path / "elsewhere")
    assert claim(joined).number == 0
    assert read_meta(joined.folder).space == study.meta.space
    with pytest.raises(ConfigError, match="has no study 'nix'"):
        Study.join(study.meta.storage, "nix", tmp_path / "elsewhere")


def test_sign_of_life_tells_how_far_the_trials_are(make):
    study = make(1)
    study.signals.beat({0: {"step": 3, "of": 10, "loss": 0.5}}, busy_s=2.0, idle_s=0.1)
    (worker,) = other(study).signals.workers().values()
    assert worker["trials"] == {"0": {"step": 3, "of": 10, "loss": 0.5}}
    assert (worker["beat"], worker["busy_s"], worker["idle_s"]) == (1, 2.0, 0.1)


# --- the journal file ------------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path) -> Study:
    return Study.create(tmp_path / "s", meta("s"), [Entry()] * 3)


def test_torn_last_line_is_no_line(journal):
    claim(journal)
    with open(journal.folder / "journal.log", "ab") as file:
        file.write(b'{"op_code": 5, "trial_id": 1, "sta')
    again = Study.open(journal.folder)
    assert [t.state.name for t in again.trials()] == ["RUNNING", "WAITING", "WAITING"]
    assert claim(again).number == 1
    assert len(Study.open(journal.folder).trials()) == 3
    for line in (journal.folder / "journal.log").read_text().splitlines():
        json.loads(line)


def test_full_disk_leaves_the_journal_as_it_was(journal, monkeypatch):
    before = (journal.folder / "journal.log").read_bytes()

    def full(file, data):
        file.write(data[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_write_all", full)
    with pytest.raises(OSError, match="No space"):
        claim(journal)
    monkeypatch.undo()
    assert (journal.folder / "journal.log").read_bytes() == before
    assert claim(Study.open(journal.folder)).number == 0


def test_study_whose_making_was_cut_short_is_told(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "journal.log").write_text("")
    with pytest.raises(ConfigError, match="cut short: delete the folder"):
        Study.open(tmp_path / "half")


def test_lost_connections_are_made_again(postgres, tmp_path):
    import psycopg

    def cut() -> None:
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    study = Study.create(tmp_path / "cut", meta("cut", storage=postgres), [Entry()] * 3)
    for number in range(3):
        cut()
        assert claim(study).number == number
        cut()
        study.queue.report(number, 1, 0.5)
        cut()
        study.queue.tell(number, "COMPLETE", [0.5], {})
    assert [t.state.name for t in study.trials()] == ["COMPLETE"] * 3


def test_database_that_stays_away_is_told(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_S", 1.5)
    study = Study.create(tmp_path / "away", meta("away", storage=postgres), [Entry()])
    study._store.optuna._backend.engine.dispose()
    monkeypatch.setattr(study._store.optuna._backend.engine.dialect, "connect", _refused)
    with pytest.raises(StorageDown, match="does not answer"):
        study.trials()


def _refused(*_, **__):
    import psycopg

    raise psycopg.OperationalError("connection refused")


def test_password_stays_out_of_what_is_written():
    assert without_password("postgresql://me:se:cret@host:5/db") == "postgresql://me@host:5/db"
    assert without_password("postgresql://me@host/db") == "postgresql://me@host/db"


def test_password_goes_to_the_environment(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "")
    kept = database_url("postgresql://me:s%40cret@host/db")
    assert kept == "postgresql://me@host/db"
    assert os.environ["PGPASSWORD"] == "s@cret"


def test_trial_that_shares_what_is_loaded_goes_first_and_all_are_run(tmp_path):
    queue = [Entry(overrides=[f"lora.r={r}", "train.learning_rate=1e-3"]) for r in (2, 4, 8, 2)]
    study = Study.create(tmp_path / "s", meta("s"), queue)
    claimed = [study.claim(lambda overrides: "lora.r=2" in overrides) for _ in range(5)]
    assert claimed == [0, 3, 1, 2, None]
