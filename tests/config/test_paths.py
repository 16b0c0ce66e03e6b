"""Names of folders and files that could be grammar: whatever was not typed as grammar is a name."""

import os
from pathlib import Path

import pytest

from lorasweep.config import paths
from lorasweep.config.overrides import override_text, parse
from lorasweep.errors import ConfigError
from lorasweep.runner.request import Request
from lorasweep.search import space

ODD = [
    *("plain", "with space", "a,b", "[x]", "(x)", "{x}", "a=b", "a#b", "it's", '"q"', "a&b", "~a", "a;b"),
    *(
        "über",
        "中文",
        "a%20b",
        "a?b",
        "$HOME",
        "${x}",
        "a:b",
        "a+b",
        "!a",
        "*",
        "a\\b",
        "@x",
        "a|b",
        "a`b",
        "a^b",
        "<a>",
    ),
    *("null", "1e3", "a'\"b", "a\u00a0b", "é", "trailing "),
]


def one_value(word: str) -> object:
    parsed, problems = parse([word])
    assert problems == [] and not parsed[0].is_sweep_override()
    return parsed[0].value()


@pytest.mark.parametrize("name", ODD)
def test_any_text_is_read_back_as_it_was_written(name):
    for text in (name, f"/tmp/{name}/x", f"{name}.csv"):
        assert one_value(f"outputs={override_text(text)}") == text


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("key", paths.PATHS)
def test_path_that_is_there_is_taken_by_the_letter(name, key, tmp_path, monkeypatch):
    place = tmp_path / name
    place.mkdir()
    (place / "rows.csv").touch()
    monkeypatch.chdir(place)
    full = {"data.path": str(place / "rows.csv"), "outputs": "rows.csv"}.get(key, str(place / "rows.csv"))
    assert unescaped(one_value(Request.of([f"{key}=rows.csv"]).overrides[0])) == full
    assert unescaped(one_value(Request.of([f"{key}={place}/rows.csv"]).overrides[0])) == str(place / "rows.csv")
    monkeypatch.chdir(tmp_path)
    expected = f"{name}/rows.csv" if key == "outputs" else str(place / "rows.csv")
    assert unescaped(one_value(Request.of([f"{key}={name}/rows.csv"]).overrides[0])) == expected


def unescaped(text: object) -> str:
    """Return a text with its dollar signs as a composed configuration has them."""
    return str(text).replace(r"\${", "${")


@pytest.mark.parametrize("name", ODD)
def test_outputs_that_is_still_to_be_made_may_lie_in_a_folder_of_any_name(name, tmp_path):
    (tmp_path / name).mkdir()
    asked = Request.of([f"outputs={tmp_path}/{name}/new"])
    assert unescaped(one_value(asked.overrides[0])) == f"{tmp_path}/{name}/new"


@pytest.mark.parametrize("name", ["a=b", "it's", "[x", "über", "a#b", "a;b"])
def test_name_that_is_no_value_of_the_grammar_is_a_name(name):
    assert one_value(Request.of([f"outputs={name}"]).overrides[0]) == name


def test_comma_in_outputs_that_is_not_there_asks_for_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, problems = space.read(Request.of(["outputs=a,b"]).overrides)
    assert problems == [
        "outputs: belongs to the study as a whole and cannot vary; give it one value, "
        """a name with a comma in quotes: outputs="'a,b'" """.strip()
    ]
    assert space.read(Request.of(["outputs='a,b'"]).overrides)[1] == []


def test_several_files_vary_by_the_names_typed_and_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one.csv", "two.csv", "a,b.csv"):
        Path(name).touch()
    found, problems = space.read(Request.of(["data.path=one.csv,'a,b.csv',two.csv,none.csv"]).overrides)
    assert problems == []
    assert found.grid() == [{"data.path": n} for n in ("one.csv", "a,b.csv", "two.csv", "none.csv")]
    monkeypatch.chdir("/")
    lines = [found.line(point) for point in found.grid()]
    values = [one_value(line[0]) for line in lines]
    assert values == [str(tmp_path / "one.csv"), str(tmp_path / "a,b.csv"), str(tmp_path / "two.csv"), "none.csv"]


def test_home_is_found_where_the_shell_did_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").touch()
    assert one_value(Request.of(["data.path=~/rows.csv"]).overrides[0]) == os.fspath(tmp_path / "rows.csv")


def test_sweep_file_may_hold_a_password_no_more_than_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSWORD", "")
    file = tmp_path / "s.yaml"
    file.write_text("overrides: ['search.storage=postgresql://me:s3cret@db/sweeps', lora.r=2]\n", encoding="utf8")
    asked = Request.of(["lora.r=4"], str(file))
    assert asked.overrides == ["search.storage='postgresql://me@db/sweeps'", "lora.r=4"]
    assert os.environ["PGPASSWORD"] == "s3cret"
    with pytest.raises(ConfigError, match="must hold no password"):
        Request.of(["tracking.uri=mysql://me:s3cret@db/x"])
