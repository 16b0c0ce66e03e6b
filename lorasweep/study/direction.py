"""Which way a metric gets better."""

from typing import TypeVar

import numpy as np

Values = TypeVar("Values", float, np.ndarray)


def better(first: float, second: float, maximize: bool) -> bool:
    """Return whether the first metric is better than the second."""
    return first > second if maximize else first < second


def upward(values: Values, maximize: bool) -> Values:
    """Return values of a metric so that larger is better."""
    return values if maximize else -values
