"""Overrides to specs: what composes, and what is refused with which words."""

import itertools

import pytest

from lorasweep.config import compose, spec, sweep_file
from lorasweep.config.overrides import group_options, override_text, parse
from lorasweep.config.registry import data_folder
from lorasweep.errors import ConfigError
from lorasweep.search import space


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.compose_trial(overrides)
    return caught.value.problems


def test_command_of_the_readme_composes():
    trial = compose.compose_trial(["task_type=causal_lm", "model=smollm2_135m", "lora=all_linear"])
    assert (trial.task_type.name, trial.model.pretrained) == ("CAUSAL_LM", "fetched:smollm2")
    assert trial.lora.target_modules == "all-linear"


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in spec.SECTIONS for n in group_options(g)])
def test_every_file_in_conf_composes(group, name):
    extra = ["data.path=x"] if group == "data" and name != "builtin" else []
    assert compose.compose_trial([f"{group}={name}", *extra])


@pytest.mark.parametrize("name", group_options("task_type"))
def test_task_type_alone_composes_and_keeps_a_chosen_model(name):
    assert compose.compose_trial([f"task_type={name}"]).task_type.name == name.upper()
    assert compose.compose_trial([f"task_type={name}", "model=bert_base"]).model.pretrained.endswith(
        "bert-base-uncased"
    )


@pytest.mark.parametrize("folder", ["/m/x", "'/m/{x}'", "'/m/\\${x}'"])
def test_another_model_takes_nothing_of_the_groups_own(folder):
    """However the folder's name is read: braces need Hydra's own reading."""
    trial = compose.compose_trial(["model=minilm_encoder_decoder", f"model.pretrained={folder}"])
    assert (trial.model.sha256, trial.model.decoder) == (None, None)
    own = compose.compose_trial(["model=minilm_encoder_decoder"]).model
    again = compose.compose_trial(["model=minilm_encoder_decoder", f"model.pretrained={own.pretrained}"]).model
    assert again == own and own.sha256


def test_all_problems_come_at_once_with_key_rule_value_and_next_move():
    found = problems("lora.r=0", "train.learning_rte=1", "model=minilmm", "lora.lora_dropout=x", "train.seed=-1")
    text = "\n".join(found)
    assert len(found) == 5
    assert "lora.r: must be between 1 and 1024, got 0" in text
    assert "train.learning_rte: no such key; did you mean 'train.learning_rate'?" in text
    assert "did you mean 'minilm'?" in text
    assert "lora.lora_dropout: must be a number, got 'x'" in text


def test_unknown_key_is_answered_with_the_keys_of_its_section():
    (told,) = problems("model.load_in_4bit=true")
    keys = told.partition("no such key; known: ")[2].split(", ")
    assert "model.quantization" in keys and {k.partition(".")[0] for k in keys} == {"model"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.init_lora_weights=pisa"], "pissa"),
        (["lora.init_lora_weights=orthogonal", "lora.r=3"], "must be even"),
        (["train.micro_batch_size=32", "train.batch_size=16"], "at most train.batch_size"),
        (["train.slots=null"], "must be a whole number or auto"),
        (["train.slots=many"], "must be auto or a number"),
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
    found, problems = space.read(["lora.r=8,16", "train.seed=1", "lora.init_lora_weights=true,pissa"])
    assert (found.keys, problems) == (["lora.r", "lora.init_lora_weights"], [])
    values = [(p["lora.r"], p["lora.init_lora_weights"]) for p in found.grid()]
    assert values == list(itertools.product([8, 16], [True, "pissa"]))
    assert found.line(found.grid()[0]) == ["train.seed=1", "lora.r=8", "lora.init_lora_weights=true"]


def test_every_point_of_a_grid_is_checked():
    found, problems = space.read(["lora.r=8,0,5000"])
    with pytest.raises(ConfigError) as caught:
        compose.compose_points([found.line(p) for p in found.grid()], problems)
    assert [p.split("got ")[1] for p in caught.value.problems] == ["0", "5000"]


@pytest.mark.parametrize("path", sorted(data_folder("sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_file_states_its_question_and_composes(path):
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[0].endswith((".", "?"))
    file = sweep_file.sweep_file(path.stem)
    found, problems = space.read(file.overrides, file.space)
    lines = [found.line(p) for p in found.corners()]
    specs = compose.compose_points(lines, problems)
    assert len(specs) > 1
    if specs[0].search.sampler == "grid":
        assert len(compose.compose_points([found.line(p) for p in found.grid()])) > 1


def outcome(overrides: list[str]) -> object:
    try:
        return compose.compose_trial(overrides)
    except ConfigError as error:
        return error.problems


GROUPS = [f"{g}={n}" for g in spec.SECTIONS for n in group_options(g)]
LISTS = [
    *[[group, "lora.r=3", "data.path=x"] for group in GROUPS],
    [],
    ["task_type=causal_lm", "model=minilm", "train.learning_rate=1e-4"],
    ["model=minilm", "task_type=causal_lm", "task_type.name=SEQ_CLS"],
    ["lora.r=4", "lora=qv", "lora.target_modules=[query,'value']", "lora.r=8"],
    ["lora.target_modules=mlp", "lora=qv"],
    ["lora.layers_to_transform=[0,1]", "lora.lora_alpha=null", "lora.init_lora_weights=true"],
    ["lora.layers_to_transform=[0,1]", "lora.layers_to_transform=3"],
    ["lora.rank_pattern={query:4}", "lora.r=2"],
    ["lora.rank_pattern={query:4}", "lora.rank_pattern={value:2}"],
    ["lora.rank_pattern={query:4}", "lora.rank_pattern=null"],
    ["train.seed=${train.batch_size}", "train.batch_size=7"],
    ["data.text_column='${data.label_column}'", "data.label_column=y"],
    ["data.text_column='a,b {c}'", "data.prompt_suffix=' = '", "data.source_prefix=\\ x"],
    ["train.seed=${nowhere}"],
    ["lora.r=0", "lora.lora_dropout=x", "train.micro_batch_size=32"],
    ["lora.r=[1,2]", "lora.target_modules=[]", "model.revision=1"],
    ["lora.r=4,8"],
    ["lora.r=interval(4,8)", "train.seed=1"],
    ["lora={r:4}"],
    ["lora.rr=4", "+lora.x=1", "lora.r", "model=minilmm", "train.seed=-1"],
    ["outputs=/tmp/x", "study=s", "search.trials=3", "search.objectives=[trainable]"],
    ["outputs={a:1}", "study=[1]"],
    ["hydra.job.name=x", "lora.r=4", "hydra/launcher=basic"],
    ["hydra/launcher=nope"],
    ["model@lora=minilm"],
]


@pytest.mark.parametrize("overrides", LISTS, ids=" ".join)
def test_short_way_composes_what_hydra_composes(overrides, monkeypatch):
    short = outcome(overrides)
    with monkeypatch.context() as patch:
        patch.setattr(compose, "_is_plain_value", lambda override: False)
        assert short == outcome(overrides)
    assert short == outcome(overrides), "nothing that was composed since has changed it"


def test_short_way_asks_hydra_once_for_trials_of_the_same_groups(monkeypatch):
    compose.compose_trial(["model=minilm", "lora.r=2"])
    monkeypatch.setattr(compose, "compose", None)
    for r in range(4, 8):
        trial = compose.compose_trial(["model=minilm", f"lora.r={r}", "lora.target_modules=[query,value]"])
        assert (trial.lora.r, trial.lora.target_modules) == (r, ["query", "value"])
        trial.lora.target_modules.append("changed")


def test_override_text_is_read_back_as_the_same_value():
    plain = [None, True, False, 1, -2.5, 1e-05, "all-linear", "a b", "it's", 'say "x"', "both ' and \"", "a,b", "8"]
    odd = ["true", "null", "", "[x]", "x\\", "\\'", "é", "  lead", "a\nb", "a=b", "$x", "a;b", "{c}", "nan"]
    nested = [["a", "b,c", None, 1.5], {"layer.0.q": 8, "a b": 1}, [], {}, [["x"]]]
    for value in plain + odd + nested:
        parsed, problems = parse([f"data.path={override_text(value)}"])
        assert problems == [] and parsed[0].value() == value


def write(tmp_path, text: str):
    path = tmp_path / "asked.yaml"
    path.write_text(text)
    return path


def test_sweep_file_holds_question_overrides_search_and_space(tmp_path):
    text = """# Which rank?
overrides: [train.epochs=1]
space: {lora.r: "2,4", lora.lora_alpha: {low: 8, high: 64}}
search: {sampler: tpe, objectives: [trainable], question: "a, b"}
"""
    file = sweep_file.read_sweep_file(write(tmp_path, text))
    assert (file.question, list(file.space)) == ("Which rank?", ["lora.r", "lora.lora_alpha"])
    assert file.overrides == [
        "train.epochs=1",
        "search.sampler=tpe",
        "search.objectives=[trainable]",
        "search.question='a, b'",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("overides: [lora.r=1]", "did you mean 'overrides'"),
        ("overrides: [lora.r=1]\nsearch: {trails: 3}", "did you mean 'trials'"),
        ("overrides: [lora.r=1]\nspace: {lora.r: '1,2'}", "stands in overrides and in space"),
        ("overrides: [search.trials=1]\nsearch: {trials: 2}", "stands in overrides and in search"),
        ("overrides: lora.r=1", "must be a list"),
        ("space: [lora.r]", "must be a mapping"),
        ("# nothing", "both are empty"),
        ("[a, b]", "must hold"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_sweep_file_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        sweep_file.read_sweep_file(write(tmp_path, text))


def test_unknown_sweep_file_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        sweep_file.sweep_file("rnak")
