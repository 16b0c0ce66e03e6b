"""Overrides to specs: what composes, and what is refused with which words."""

import itertools

import pytest

from lorasweep import compose, space, spec
from lorasweep.errors import ConfigError


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.compose_trial(overrides)
    return caught.value.problems


def test_command_of_the_readme_composes():
    trial = compose.compose_trial(["task_type=causal_lm", "model=smollm2_135m", "lora=all_linear"])
    assert (trial.task_type.name, trial.model.pretrained) == ("CAUSAL_LM", "fetched:smollm2")
    assert trial.lora.target_modules == "all-linear"


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in spec.SECTIONS for n in compose.group_options(g)])
def test_every_file_in_conf_composes(group, name):
    extra = ["data.path=x"] if group == "data" and name != "builtin" else []
    assert compose.compose_trial([f"{group}={name}", *extra])


@pytest.mark.parametrize("name", compose.group_options("task_type"))
def test_task_type_alone_composes_and_keeps_a_chosen_model(name):
    assert compose.compose_trial([f"task_type={name}"]).task_type.name == name.upper()
    assert compose.compose_trial([f"task_type={name}", "model=bert_base"]).model.pretrained.endswith(
        "bert-base-uncased"
    )


def test_all_problems_come_at_once_with_key_rule_value_and_next_move():
    found = problems("lora.r=0", "train.learning_rte=1", "model=minilmm", "lora.lora_dropout=x", "train.seed=-1")
    text = "\n".join(found)
    assert len(found) == 5
    assert "lora.r: must be between 1 and 1024, got 0" in text
    assert "train.learning_rte: no such key; did you mean 'train.learning_rate'?" in text
    assert "did you mean 'minilm'?" in text
    assert "lora.lora_dropout: must be a number, got 'x'" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.init_lora_weights=pisa"], "pissa"),
        (["lora.init_lora_weights=orthogonal", "lora.r=3"], "must be even"),
        (["train.micro_batch_size=32", "train.batch_size=16"], "at most train.batch_size"),
        (["data=csv"], "data.path"),
        (["lora.layers_to_transform=[0]", "lora.target_modules='.*query'"], "as a list"),
        (["train.learning_rate=nan"], "above 0"),
        (["study=../escape"], "letters, digits"),
        (["+lora.new=1"], "keys are fixed"),
        (["lora.r"], "key=value"),
    ],
)
def test_bad_value_is_refused(overrides, words):
    assert words in "\n".join(problems(*overrides))


def test_overrides_of_a_trial_leave_out_where_it_is_kept():
    trial = compose.compose_trial(["lora.r=4", "outputs=/tmp/x", "study=s"])
    assert trial.overrides == ("lora.r=4",)
    assert trial.outputs == "/tmp/x"


def test_grid_holds_every_combination_once():
    grid = space.grid(["lora.r=8,16", "train.seed=1", "lora.init_lora_weights=true,pissa"])
    assert grid.swept == ["lora.r", "lora.init_lora_weights"]
    values = [(p["lora.r"], p["lora.init_lora_weights"]) for p in grid.points]
    assert values == list(itertools.product([8, 16], [True, "pissa"]))
    assert grid.lines[0] == ["lora.r=8", "train.seed=1", "lora.init_lora_weights=True"]


def test_every_point_of_a_grid_is_checked():
    with pytest.raises(ConfigError) as caught:
        compose.compose_points(space.grid(["lora.r=8,0,5000"]).lines)
    assert [p.split("got ")[1] for p in caught.value.problems] == ["0", "5000"]


@pytest.mark.parametrize("path", sorted(compose.data_folder("sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_file_states_its_question_and_composes(path):
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[0].endswith((".", "?"))
    grid = space.grid(compose.sweep_file(path.stem))
    assert len(compose.compose_points(grid.lines, grid.problems)) == len(grid.points) > 1


def test_unknown_sweep_file_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        compose.sweep_file("rnak")


def test_every_key_is_described():
    undescribed = [path for path, _, text in spec.described_keys() if not text and not path.endswith("_column")]
    assert undescribed == []
