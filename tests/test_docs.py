"""The pages of docs/ that are made from the code say what it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lorasweep.config.fields import texts_below_fields
from lorasweep.study import result

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_files_is_what_the_code_says(generate):
    again = "docs/files.md is behind the code: python docs/generate.py"
    assert (DOCS / "files.md").read_text(encoding="utf8") == generate.files_page(), again


def test_every_key_of_a_result_is_described():
    assert [name for name, text in texts_below_fields(result).items() if not text] == []
