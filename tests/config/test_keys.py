"""Every key is described, and docs/keys.md says the same."""

from pathlib import Path

from lorasweep.config import keys, spec
from lorasweep.config.fields import Affects

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def key(path: str) -> keys.Key:
    return next(k for k in keys.described_keys() if k.path == path)


def test_every_key_is_described():
    described = keys.described_keys()
    assert [k.path for k in described] == spec.known_keys()
    assert [k.path for k in described if not k.meaning or not k.allowed] == []


def test_a_key_tells_group_default_values_and_what_it_affects():
    assert key("lora.r") == keys.Key(
        path="lora.r",
        group="lora",
        default="8",
        allowed="a whole number, from 1 to 1024",
        affects=("memory", "result"),
        meaning="Rank of the update BA, 1 to 1024.",
    )
    assert key("train.micro_batch_size").allowed == "a whole number or auto or null, from 1"
    assert key("data.max_target_tokens").allowed == "a whole number, from 2 to 1000000"
    assert key("task_type.temperature").allowed == "a number, above 0 to 100"
    assert key("model.device_map").allowed == "one of auto, balanced or null"
    assert key("lora.init_lora_weights").allowed.startswith("one of true, false, gaussian, ")
    assert key("search.sampler").affects == ("study",)
    assert (key("study").group, key("study").affects) == ("", ())


def test_every_effect_is_explained():
    assert set(keys.EFFECTS) == set(Affects)


def test_page_of_keys_is_what_the_settings_say():
    assert PAGE.read_text(encoding="utf8") == keys.page(), "make docs"
