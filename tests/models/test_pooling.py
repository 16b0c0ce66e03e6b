"""What a sentence-transformers folder says of its embeddings is what they are made by."""

import json
from pathlib import Path

import pytest

from lorasweep.config.spec import ModelSpec
from lorasweep.errors import ConfigError
from lorasweep.models import pooling


def folder(tmp_path: Path, **files: object) -> str:
    for name, content in files.items():
        path = tmp_path / {"modes": "1_Pooling/config.json", "said": "config_sentence_transformers.json"}.get(
            name, f"{name}.json"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("modes", "way"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 32}, "mean"),
    ],
)
def test_pooling_is_the_checkpoints_unless_another_is_asked_for(tmp_path, modes, way):
    place = folder(tmp_path, modes=modes)
    assert pooling.way(ModelSpec(pretrained=place), place) == way
    assert pooling.way(ModelSpec(pretrained=place, pooling="last"), place) == "last"


def test_folder_that_says_nothing_is_pooled_by_the_mean(tmp_path):
    spec = ModelSpec(pretrained=str(tmp_path))
    assert pooling.way(spec, str(tmp_path)) == "mean"
    assert pooling.prompts(spec, str(tmp_path)) == {}
    assert pooling.left_out(spec, str(tmp_path)) == []


@pytest.mark.parametrize(
    "modes",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_pooling_that_no_task_knows_is_refused_with_the_way_out(tmp_path, modes):
    place = folder(tmp_path, modes=modes)
    with pytest.raises(ConfigError, match=r"pools by .*choose one, e\.g\. model\.pooling=mean"):
        pooling.way(ModelSpec(pretrained=place), place)


def test_pooling_module_is_where_modules_json_says(tmp_path):
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "2_Pool", "type": "sentence_transformers.models.Pooling"}]
    modules += [{"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    place = folder(tmp_path, modules=modules, modes={"pooling_mode_mean_tokens": True})
    (tmp_path / "2_Pool").mkdir()
    (tmp_path / "2_Pool" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert pooling.way(ModelSpec(pretrained=place), place) == "cls"
    assert "a module behind its pooling" in pooling.left_out(ModelSpec(pretrained=place), place)[0]


def test_prompts_are_the_checkpoints(tmp_path):
    said = {"prompts": {"query": "query: ", "document": "text: ", "STS": None}, "default_prompt_name": "document"}
    place = folder(tmp_path, said=said)
    found = pooling.prompts(ModelSpec(pretrained=place), place)
    assert found == {"query": "query: ", "document": "text: ", "": "text: "}
