"""Search spaces: what is read from overrides and sweep files, what a grid holds, which conditions count."""

import itertools
import json

import pytest

from lorasweep.config import compose
from lorasweep.config.overrides import group_options, parse
from lorasweep.errors import ConfigError
from lorasweep.search import condition, space
from lorasweep.search.space import Space

CONDITIONAL = {
    "lora.init_lora_weights": "true,pissa",
    "lora.r": {"choices": [4, 8], "when": "lora.init_lora_weights == 'pissa'"},
    "lora.use_rslora": {"choices": [True, False], "when": "lora.r > 4"},
}


def sound(*overrides: str) -> Space:
    return made({}, *overrides)


def made(entries: dict, *overrides: str) -> Space:
    found, problems = space.read(overrides, entries)
    assert problems == []
    return found


def problems(*overrides: str, entries: dict | None = None) -> str:
    return "\n".join(space.read(overrides, entries)[1])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("lora.r=4,8,16", [4, 8, 16]),
        ("lora.r=choice(4,8)", [4, 8]),
        ("lora.r=8,8,16", [8, 16]),
        ("lora.r=range(1,8,3)", [1, 4, 7]),
        ("lora.r=range(3)", None),
        ("lora.r=range(8,2,-3)", [8, 5]),
        ("lora.r=sort(16,4,8)", [4, 8, 16]),
        ("lora.r=sort(16,4,8,reverse=true)", [16, 8, 4]),
        ("lora.r=sort(range(8,2,-2))", [4, 6, 8]),
        ("lora.r=interval(4,7)", [4, 5, 6, 7]),
        ("lora.lora_alpha=int(interval(8,10))", [8, 9, 10]),
        ("lora.lora_dropout=range(0,0.5,0.1)", [0.0, 0.1, 0.2, 0.3, 0.4]),
        ("lora.init_lora_weights=true,gaussian", [True, "gaussian"]),
        ("data.text_column=choice('8','a,b',\"it's\",'')", ["8", "a,b", "it's", ""]),
        ("lora.target_modules=[query,'a,b'],all-linear", ["[query,'a,b']", "all-linear"]),
        ("lora.exclude_modules=null,key", [None, "key"]),
        ("lora=glob([q*,a*],exclude=all*)", ["attention", "qkvo", "qv"]),
        ("model=minilm,bert_base", ["minilm", "bert_base"]),
    ],
)
def test_sweep_syntax_gives_its_values(override, values):
    if values is None:
        assert "must be between 1 and 1024, got 0" in problems(override)
        return
    found = sound(override)
    key = override.split("=")[0]
    assert [p[key] for p in found.grid()] == values
    assert [type(p[key]) for p in found.grid()] == [type(v) for v in values]


def test_glob_lists_a_whole_group():
    assert [p["model"] for p in sound("model=glob(*)").grid()] == group_options("model")


def test_shuffled_values_are_the_same_values():
    assert sorted(p["lora.r"] for p in sound("lora.r=shuffle(range(1,9))").grid()) == list(range(1, 9))
    assert sorted(p["lora.r"] for p in sound("lora.r=shuffle(4,8,16)").grid()) == [4, 8, 16]


def test_range_keeps_its_scale_and_takes_whole_numbers_from_the_keys_type():
    found = sound("lora.r=tag(log,interval(4,64))", "train.learning_rate=tag(log,interval(1e-5,3e-3))")
    r, rate = found.dimensions
    assert (r.low, r.high, r.log, r.whole) == (4, 64, True, True)
    assert (rate.low, rate.high, rate.log, rate.whole) == (1e-5, 3e-3, True, False)


def test_sweep_file_entries_are_strings_or_mappings():
    entries = {
        "lora.r": "2,4",
        "lora.target_modules": {"choices": {"qv": ["query", "value"], "all": "all-linear"}},
        "lora.lora_dropout": {"low": 0, "high": 0.5, "step": 0.25},
        "lora.layers_to_transform": {"choices": [None, [0, 1]]},
    }
    found = made(entries, "train.epochs=1")
    assert found.keys == list(entries)
    assert len(found.grid()) == 2 * 2 * 3 * 2
    last = found.grid()[-1]
    assert last == {
        "lora.r": 4,
        "lora.target_modules": "all",
        "lora.lora_dropout": 0.5,
        "lora.layers_to_transform": "[0,1]",
    }
    assert found.line(found.grid()[0]) == [
        "train.epochs=1",
        "lora.r=2",
        "lora.target_modules=[query,value]",
        "lora.lora_dropout=0.0",
        "lora.layers_to_transform=null",
    ]


def test_override_wins_over_the_file_and_over_an_earlier_one():
    entries = {"lora.r": "2,4", "lora.lora_alpha": "8,16"}
    assert made(entries, "lora.r=8").fixed == ("lora.r=8",)
    assert [p["lora.r"] for p in made(entries, "lora.r=32,64", "lora.lora_alpha=1").grid()] == [32, 64]
    assert sound("lora.r=1,2", "lora.r=4").fixed == ("lora.r=4",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r=interval(64,4)", "lora.r: low must not be above high, got 64 and 4"),
        ("lora.r=interval(0.5,4)", "low must be a whole number, got 0.5"),
        ("lora.r=4,0", "lora.r: must be between 1 and 1024, got 0"),
        ("lora.r=interval(1,5000)", "lora.r: must be between 1 and 1024, got 5000"),
        ("lora.r=a,b", "lora.r: must be a whole number, got 'a'"),
        ("lora.r=range(4,4)", "holds no value"),
        ("lora.r=range(1,4,0)", "holds no value"),
        ("lora.bias=interval(1,2)", "takes no number; write the values, lora.bias=a,b,c"),
        ("lora.bias=none,al", "did you mean 'all'"),
        ("lora.lora_alpha=tag(log,interval(0,3))", "above 0, got 0"),
        ("train.max_grad_norm=tag(log,interval(0,3))", "log needs low above 0, got 0"),
        ("lora.lora_alpha=tag(lgo,interval(1,3))", "tag 'lgo' means nothing"),
        ("lora.lora_alpha=tag(log,choice(1,3))", "goes with interval()"),
        ("search.trials=3,4", "search.trials: belongs to the study"),
        ("outputs=a,b", "outputs: belongs to the study"),
        ("model=minilm,minilmm", "did you mean 'minilm'"),
        ("model=glob(zz*)", "matches no model"),
        ("model=interval(1,2)", "not a number"),
        ("lora.r=glob(*)", "lists the files of a group"),
        ("lora.rr=1,2", "did you mean 'lora.r'"),
    ],
)
def test_bad_sweep_is_refused(override, words):
    assert words in problems(override)


@pytest.mark.parametrize(
    ("key", "entry", "words"),
    [
        ("lora.r", {"lo": 1, "high": 2}, "lora.r.lo: no such field; did you mean 'low'?"),
        ("lora.r", {"low": 1}, "high is missing"),
        ("lora.r", {"choices": []}, "choices are empty"),
        ("lora.r", {"choices": 4}, "must be a list, or a mapping"),
        ("lora.r", {"choices": [4], "low": 1}, "choices and low exclude each other"),
        ("lora.r", {"choices": {"big": 5000}}, "between 1 and 1024, got 5000"),
        ("lora.r", {"low": "a", "high": 2}, "low must be a number, got 'a'"),
        ("lora.r", {"low": 1, "high": 2, "log": "yes"}, "log must be true or false"),
        ("lora.r", {"low": 1, "high": 8, "step": 2, "log": True}, "log and step exclude each other"),
        ("lora.r", {"low": 1, "high": 8, "step": 0}, "step must be above 0"),
        ("lora.r", {"low": 1, "high": 8, "when": True}, "when must be a condition"),
        ("lora.r", [4, 8], "must be a string such as '4,8,16', or a mapping"),
        ("lora.r", "8", "does not vary"),
        ("lora.rr", {"low": 1, "high": 2}, "did you mean 'lora.r'"),
        ("search.seed", {"low": 1, "high": 2}, "belongs to the study"),
        ("lora.r", {"low": 1, "high": 2, "when": "lora.bias =="}, "is not an expression"),
        ("lora.r", {"low": 1, "high": 2, "when": "open('x')"}, "may hold keys, constants"),
        ("lora.r", {"low": 1, "high": 2, "when": "lora.biass == 'all'"}, "did you mean 'lora.bias'"),
        ("lora.r", {"low": 1, "high": 2, "when": "model == 'minilm'"}, "the group model, which does not vary"),
        ("lora.r", {"low": 1, "high": 2, "when": "lora.bias == 'al'"}, "did you mean 'all'"),
        ("lora.r", {"low": 1, "high": 2, "when": "lora.r > 1"}, "wait for each other"),
    ],
)
def test_bad_entry_is_refused(key, entry, words):
    assert words in problems(entries={key: entry})


def test_all_problems_come_at_once():
    text = problems("lora.r=4,0", "lora.bias=x,y", entries={"train.seed": 7, "train.epochs": {"choices": []}})
    assert len(text.splitlines()) == 5


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lora.r > 4", True),
        ("4 < lora.r <= 8", True),
        ("not lora.r > 4", False),
        ("lora.init == 'pissa' and lora.r > 4", True),
        ("lora.init in ('olora', 'gaussian') or lora.r == 8", True),
        ("lora.init not in ['olora', 'pissa']", False),
        ("lora.on == true and lora.none is null", True),
        ("lora.none > 3", False),
        ("lora.init < 3", False),
        ("lora.on", True),
        ("lora.r == -8", False),
        ("model != 'minilm'", False),
    ],
)
def test_condition_holds_or_not(text, value):
    values = {"lora.r": 8, "lora.init": "pissa", "lora.on": True, "lora.none": None, "model": "minilm"}
    assert condition.holds(text, values.__getitem__) is value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "lora.r + 1",
        "lora['r']",
        "(lambda: 1)()",
        "[x for x in y]",
        "a if b else c",
        "f'{a}'",
        "1; 2",
    ],
)
def test_condition_runs_no_code(text):
    with pytest.raises(ValueError, match=r"may hold|not an expression"):
        condition.parse(text)


def test_conditions_on_each_other_are_refused():
    wrong = problems(
        entries={
            "lora.use_dora": {"choices": [True, False], "when": "lora.use_rslora"},
            "lora.use_rslora": {"choices": [True, False], "when": "lora.use_dora"},
        }
    )
    assert wrong.count("wait for each other") == 1


def test_comparison_with_a_value_that_is_no_choice_is_refused():
    entries = CONDITIONAL | {"lora.r": {"choices": [4, 8], "when": "lora.init_lora_weights == 'pisa'"}}
    assert "which it never is; did you mean 'pissa'?" in problems(entries=entries)


def test_conditions_look_back_whatever_the_order_in_the_file():
    found = made(dict(reversed(CONDITIONAL.items())))
    assert found.keys == list(CONDITIONAL)


def test_condition_on_a_key_that_does_not_vary_takes_its_value_or_its_default():
    entries = {"lora.r": {"choices": [4, 8], "when": "train.epochs > 2 and lora.bias == 'none'"}}
    assert len(made(entries).grid()) == 2
    assert made(entries, "train.epochs=1").grid() == [{}]
    assert len(made(entries, "train.epochs=9").grid()) == 2


def test_condition_on_a_key_that_is_not_set_takes_its_default():
    entries = CONDITIONAL | {"lora.use_dora": {"choices": [True], "when": "lora.r == 8"}}
    points = made(entries).grid()
    assert {"lora.init_lora_weights": True, "lora.use_rslora": True, "lora.use_dora": True} in points, (
        "r is 8 by default"
    )


def test_condition_on_a_key_of_a_varying_group_is_refused():
    entries = {"lora.r": {"choices": [4, 8], "when": "lora.target_modules == 'qv'"}}
    assert "which the varying group lora sets; name lora itself" in problems("lora=qv,mlp", entries=entries)
    points = made({"lora.r": {"choices": [4, 8], "when": "lora == 'qv'"}}, "lora=qv,mlp").grid()
    assert points == [{"lora": "qv", "lora.r": 4}, {"lora": "qv", "lora.r": 8}, {"lora": "mlp"}]


# --- points ----------------------------------------------------------------------------------------------------------


def test_grid_holds_every_combination_once_the_last_key_fastest():
    points = sound("lora.r=4,8", "train.seed=0", "lora.lora_dropout=range(0,0.3,0.1)").grid()
    values = [(p["lora.r"], p["lora.lora_dropout"]) for p in points]
    assert values == list(itertools.product([4, 8], [0.0, 0.1, 0.2]))


def test_grid_of_conditions_holds_every_point_once():
    points = made(CONDITIONAL).grid()
    init, r, rs = CONDITIONAL
    assert points == [
        {init: True, rs: True},
        {init: True, rs: False},
        {init: "pissa", r: 4},
        {init: "pissa", r: 8, rs: True},
        {init: "pissa", r: 8, rs: False},
    ]


@pytest.mark.parametrize("override", ["lora.lora_alpha=interval(8,64)", "lora.r=tag(log,interval(4,64))"])
def test_range_without_end_is_no_grid(override):
    with pytest.raises(ConfigError, match=r"interval\(\) has no end as a grid; write the values"):
        sound(override).grid()


def test_corners_have_every_choice_and_both_ends():
    entries = CONDITIONAL | {"train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
    found = made(entries)
    corners = found.corners()
    for d in found.dimensions:
        assert {c[d.key] for c in corners if d.key in c} == set(d.ends())
    assert all(found.contains(c) for c in corners)
    assert len({str(c) for c in corners}) == len(corners)
    assert Space().corners() == [{}]


def test_lines_give_back_the_values():
    names = {"list": ["query", "a,b"], "text": "it's, well", "yes": "true"}
    found = made({"lora.target_modules": {"choices": names}, "lora.exclude_modules": {"choices": [None, "8", "a b"]}})
    for point in found.grid():
        parsed, wrong = parse(found.line(point))
        assert wrong == []
        values = {o.key_or_group: o.value() for o in parsed}
        assert values["lora.target_modules"] == names[point["lora.target_modules"]]
        assert values["lora.exclude_modules"] == point["lora.exclude_modules"]
        assert compose.compose_trial(found.line(point)).lora.exclude_modules == point["lora.exclude_modules"]


def test_value_of_an_override_is_the_name_of_the_choice_that_it_writes_out():
    found = made({"lora.target_modules": {"choices": {"qv": ["query", "value"]}}, "lora.r": "4,8"})
    assert found.value_of("lora.target_modules=[query,value]") == "qv"
    assert found.value_of("lora.target_modules=[key]") == "[key]"
    assert found.value_of("lora.r=5") == 5
    assert found.value_of("train.seed=1") == 1


def test_contains_looks_at_values_and_conditions():
    init, r, rs = CONDITIONAL
    found = made(CONDITIONAL)
    assert found.contains({init: "pissa", r: 8, rs: True})
    assert not found.contains({init: "pissa", r: 5})
    assert not found.contains({init: 1})
    assert not found.contains({"train.seed": 1})
    assert not found.contains({init: True, r: 8})
    assert not found.contains({init: "pissa", r: 4, rs: True})
    assert found.contains({r: 8}), "init is absent and may be pissa"


@pytest.mark.parametrize(
    ("overrides", "entries"),
    [
        ((), {}),
        (("train.epochs=1", "lora.r=4,8", "model=minilm,bert_base", "lora.exclude_modules=null,key"), {}),
        (("lora.r=interval(4,64)", "lora.lora_alpha=int(interval(8,64))", "lora.lora_dropout=range(0,0.5,0.1)"), {}),
        ((), CONDITIONAL),
        ((), {"lora.target_modules": {"choices": {"qv": ["query", "value"], "8": "all-linear"}}}),
        ((), {"train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True, "when": "lora.bias == 'all'"}}),
    ],
)
def test_description_holds_all_of_a_space(overrides, entries):
    found = made(entries, *overrides)
    assert Space.from_json(json.loads(json.dumps(found.describe()))) == found
    again = made({d.key: d.as_yaml() for d in found.dimensions}, *found.fixed)
    assert space.differences(found, again) == []
    assert again.dimensions == found.dimensions


def test_differences_are_told_key_by_key():
    old = made({"lora.target_modules": {"choices": {"qv": ["query"]}}}, "lora.r=2,8,32", "train.epochs=1", "study=a")
    new = made(
        {"lora.target_modules": {"choices": {"qv": ["value"]}}, "lora.lora_alpha": {"low": 8, "high": 64}},
        "lora.r=4,8",
        "train.epochs=3",
        "study=b",
    )
    assert space.differences(old, new) == [
        "train.epochs: was 1, is 3",
        "lora.r: was 2,8,32, is 4,8",
        "lora.target_modules: was qv=[query], is qv=[value]",
        "lora.lora_alpha: was not set, is 8.0 to 64.0",
    ]
    assert space.differences(old, old) == []
