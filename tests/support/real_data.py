"""Real data sets, which lie beside the checkout where there are any."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where a data set is not there."""
    return pytest.mark.skipif(not (FOLDER / name).is_dir(), reason=f"{name} is not in ../shared/data")
