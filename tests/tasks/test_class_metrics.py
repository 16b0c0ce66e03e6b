"""Metrics of classes are scikit-learn's, with weights too: the bootstrap counts examples as often as they weigh."""

import numpy as np
import pytest
from sklearn import metrics as theirs

from lorasweep.config.spec import TaskSpec
from lorasweep.tasks import make
from lorasweep.tasks.metric import Metric

ROWS, CLASSES = 120, 4


def predictions(classes: int, multi: bool = False) -> list[dict]:
    rng = np.random.default_rng(3)
    out = []
    for row in range(ROWS):
        shares = rng.dirichlet(np.ones(classes)).round(1)  # equal ones among them
        label = int(rng.integers(classes))
        on = (rng.random(classes) < 0.4).astype(int).tolist()
        out.append(
            {
                "row": row,
                "loss": 1.0,
                "supervised": 1,
                "shares": shares.tolist(),
                "prediction": (shares > 0.3).astype(int).tolist() if multi else int(shares.argmax()),
                "label": on if multi else label,
            }
        )
    return out


def metric_of(name: str, classes: int = CLASSES, kind: str = "single_label", **spec) -> Metric:
    task = make(TaskSpec(name="SEQ_CLS", problem_type=kind, metrics=[name], **spec))
    task.classes = [f"c{i}" for i in range(classes)]
    return task.metric(name)


def expected(name: str, found: list[dict], weight: np.ndarray, classes: int) -> float:
    shares, label, answer = (np.array([p[key] for p in found]) for key in ("shares", "label", "prediction"))
    one_hot = np.eye(classes)[label]
    match name:
        case "auroc" if classes == 2:
            return theirs.roc_auc_score(label, shares[:, 1], sample_weight=weight)
        case "auroc":
            return np.mean(
                [theirs.roc_auc_score(one_hot[:, c], shares[:, c], sample_weight=weight) for c in range(classes)]
            )
        case "auprc" if classes == 2:
            return theirs.average_precision_score(label, shares[:, 1], sample_weight=weight)
        case "auprc":
            return theirs.average_precision_score(one_hot, shares, average="macro", sample_weight=weight)
        case "balanced_accuracy":
            return theirs.balanced_accuracy_score(label, answer, sample_weight=weight)
    return theirs.fbeta_score(label, answer, beta=float(name[1:]), average="macro", sample_weight=weight)


@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("name", ["auroc", "auprc", "balanced_accuracy", "f2", "f0.5"])
def test_metric_is_scikit_learns_with_and_without_weights(name, classes):
    found = predictions(classes)
    parts = metric_of(name, classes).parts(found)
    weights_RN = np.random.default_rng(5).integers(0, 3, (4, ROWS)).astype(float)
    assert parts.value == pytest.approx(expected(name, found, np.ones(ROWS), classes))
    assert parts.combined(weights_RN) == pytest.approx([expected(name, found, w, classes) for w in weights_RN])


def test_auroc_of_several_classes_a_text_is_the_mean_over_them():
    found = predictions(CLASSES, multi=True)
    label, shares = (np.array([p[key] for p in found]) for key in ("label", "shares"))
    for name, ours in (("auroc", theirs.roc_auc_score), ("auprc", theirs.average_precision_score)):
        value = metric_of(name, CLASSES, "multi_label").value(found)
        assert value == pytest.approx(ours(label, shares, average="macro"))


def test_calibration_error_is_the_distance_of_confidence_and_accuracy():
    """Of 100 rows at confidence 0.9, 70 are right; of 100 at 0.6, all are."""
    found = [
        {"row": i, "shares": [sure, 1 - sure], "prediction": 0, "label": int(i >= right)}
        for start, sure, right in ((0, 0.9, 70), (100, 0.6, 200))
        for i in range(start, start + 100)
    ]
    assert metric_of("calibration_error", 2).value(found) == pytest.approx((0.2 + 0.4) / 2)


def test_cost_is_the_mean_price_of_mistakes():
    costs = {"c0": {"c1": 10.0}, "c1": {"c0": 1.0}}
    found = [{"row": i, "prediction": p, "label": t} for i, (p, t) in enumerate([(1, 0), (0, 1), (0, 0), (1, 1)])]
    metric = metric_of("cost", 2, costs=costs)
    assert metric.value(found) == pytest.approx(11 / 4)
    assert not metric.maximize and metric.bounds == (0.0, 10.0)
