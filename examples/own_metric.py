"""Rank trials by a metric of your own: recall averaged over classes, with interval and comparisons like any other.

python examples/own_metric.py [key=value ...]
"""

import sys

import numpy as np

import lorasweep
from lorasweep.tasks import register_metric
from lorasweep.tasks.metric import Metric, by_row, combination


@combination
def mean_recall(weights_RN, predicted, true):
    """Weights of R resamples x N examples to R values; the two columns are what `by_row` gives below."""
    right_N, true_N = np.equal(predicted, true), np.asarray(true)
    classes = [true_N == label for label in np.unique(true_N)]
    return np.mean([weights_RN[:, c] @ right_N[c] / weights_RN[:, c].sum(1) for c in classes], axis=0)


columns = by_row(lambda p: (p["prediction"], p["label"]))
register_metric("SEQ_CLS", "mean_recall", Metric("mean_recall", columns, mean_recall))

if __name__ == "__main__":
    result = lorasweep.run(["task_type.primary=mean_recall", *sys.argv[1:]])
    print(result["metric"], result["folder"])
