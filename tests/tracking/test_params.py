"""What MLflow is told of a trial's settings."""

from lorasweep.config import spec
from lorasweep.config.compose import compose_trial
from lorasweep.tracking.outbox import Ledger, Outbox
from lorasweep.tracking.runs import TrialRun


def params(tmp_path, *overrides: str, **swept: object) -> dict[str, str]:
    box = Outbox(tmp_path, Ledger(experiment="e", name="0", kind="trial"))
    TrialRun(tmp_path, box).params(compose_trial(list(overrides)), swept)
    return box.ledger.params


def test_every_setting_with_a_value_is_a_param(tmp_path):
    logged = params(tmp_path, "lora.r=4", "lora.rank_pattern={query: 2}")
    settings = spec.flattened(compose_trial(["lora.r=4", "lora.rank_pattern={query: 2}"]).to_dict())
    assert set(logged) == {k for k, v in settings.items() if v not in (None, "")} | {"lora.lora_alpha"}
    assert not [key for key in logged if key.startswith("search.")]
    assert (logged["lora.r"], logged["train.adam_beta2"], logged["lora.rank_pattern"]) == ("4", "0.999", "{'query': 2}")


def test_alpha_is_logged_as_it_works_out(tmp_path):
    assert params(tmp_path, "lora.r=4")["lora.lora_alpha"] == "16.0"
    assert params(tmp_path, "lora.r=4", "lora.alpha_ratio=2")["lora.lora_alpha"] == "8.0"


def test_passwords_are_no_params(tmp_path):
    logged = params(tmp_path, "tracking.uri=http://me:hunter2@127.0.0.1:1")
    assert "127.0.0.1" in logged["tracking.uri"] and "hunter2" not in str(logged)
