"""result.json: what stands in it, that old ones are read, and what is known of a trial whose folder is elsewhere."""

import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from support.studies import end, study_of

from lorasweep.config.measures import COSTS, MEASURES
from lorasweep.study.result import Params, TrialResult, read_result, result_of, write_result

OLD = json.loads((Path(__file__).parents[1] / "support" / "results_of_7e88fe4.json").read_text())
"""Results as commit 7e88fe4 wrote them: complete and the winner, failed, never begun, given up, failed before its point
was drawn."""


def result(**known) -> TrialResult:
    return TrialResult(number=0, state="COMPLETE", reason="", overrides=[], params_swept={}, **known)


def test_every_number_says_what_it_is_and_where_it_goes():
    hints = get_type_hints(TrialResult)
    numbers = {name for name, hint in hints.items() if {float, int} & set(get_args(hint))} - {"kept_step"}  # a place
    assert numbers | {"trainable", "device_s"} == set(MEASURES)
    assert all(measure.phrase for measure in COSTS.values())


@pytest.mark.parametrize("old", OLD[:3], ids=["complete", "failed", "never begun"])
def test_old_result_is_read_and_written_as_it_was(tmp_path, old):
    (tmp_path / "result.json").write_text(json.dumps(old))
    found = read_result(tmp_path)
    write_result(tmp_path, found)
    later = {"learning_rate": None} if "params" in old else {}  # a number that those trials did not write down
    assert json.loads((tmp_path / "result.json").read_text()) == old | later


def test_old_winner_has_its_numbers():
    found = TrialResult.from_dict(OLD[0])
    assert (found.metric.name, found.metric.value) == ("accuracy", 0.0625)
    assert found.reload.same and found.trainable == 2250
    assert found.device_s == OLD[0]["train_s"] + OLD[0]["eval_s"]
    assert found.costs == {key: OLD[0][key] for key in ("adapter_mb", "train_s", "peak_gib")} | {"trainable": 2250}


@pytest.mark.parametrize("old", OLD[3:], ids=["given up", "not drawn"])
def test_old_result_without_overrides_is_read(old):
    found = TrialResult.from_dict(old)
    assert (found.overrides, found.params_swept, found.state, found.reason) == ([], {}, "FAIL", old["reason"])


def test_numbers_that_could_not_be_measured_are_null_once_a_trial_has_trained(tmp_path):
    write_result(tmp_path, result(params=Params(trainable=3)))
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["peak_gib"] is None and written["energy_j"] is None and "metric" not in written
    assert set(result().to_dict()) == {"number", "state", "reason", "overrides", "params_swept"}
    assert result().objective("peak_gib") == math.inf


@pytest.mark.parametrize("text", ["", '{"number": 0, "st', "{}"])
def test_file_that_a_power_cut_left_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path) is None


def test_result_of_a_trial_on_another_machine_is_what_the_storage_keeps(tmp_path):
    study = study_of(tmp_path, [4])
    number = end(study, 0.8, trainable=50, train_s=3.0)
    folder, trial = study.trial_folder(number), study.trial(number)
    here, elsewhere = result_of(trial, folder), result_of(trial, tmp_path / "elsewhere")
    assert here.rerun and not elsewhere.rerun
    assert elsewhere.costs == here.costs and elsewhere.device_s == here.device_s == pytest.approx(3.1)
    assert elsewhere.params_swept == here.params_swept == {"lora.r": 4}
    assert elsewhere.overrides == here.overrides


def test_device_time_of_a_failed_trial_elsewhere_is_all_its_time(tmp_path):
    study = study_of(tmp_path, [4])
    number = study.claim()
    failed = TrialResult(number=number, state="FAIL", reason="so", overrides=[], params_swept={}, wall_s=2.5)
    study.queue.tell(number, "FAIL", None, failed.stored())
    found = result_of(study.trial(number), tmp_path / "elsewhere")
    assert (found.device_s, found.reason, found.trainable) == (2.5, "so", None)
    assert study.device_s() == 2.5
