"""SEQ_CLS: transformers' loss and scikit-learn's scores for one class, several, and numbers."""

import pytest
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from support import parity
from support.models import wordpiece

from lorasweep.config import compose
from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data import dataset
from lorasweep.models import base_model
from lorasweep.tasks import make
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.tasks.task import Example
from lorasweep.training import workload

LABELS = {
    "single_label": ["cat", "dog", "cow", "dog", "cat", "dog"],
    "multi_label": ["cat|dog", "dog", "cow|cat", "dog|cow", "cat", "dog|cat|cow"],
    "regression": ["1.5", 2, -0.25, "4", 3.0, "0"],
}
TEXTS = ["A cat.", "The dog barks loudly at them.", "Milk", "Good dog, come here", "Meow meow", "Woof"]


def rows_of(kind: str) -> list[dict]:
    return [{"text": t, "label": v} for t, v in zip(TEXTS, LABELS[kind], strict=True)]


def fit(rows, problem_type: str = "auto", **splits) -> tuple[SeqCls, list[str]]:
    task = make(TaskSpec(name="SEQ_CLS", problem_type=problem_type))
    assert isinstance(task, SeqCls)
    parts = {s: rows for s in dataset.SPLITS} | splits
    return task, task.fit(dataset.Data(splits=parts, fingerprint="", name=""))


def fitted(kind: str) -> SeqCls:
    task, problems = fit(rows_of(kind), kind)
    assert problems == []
    return task


def predictions(predicted: list, labels: list, loss: float) -> list[dict]:
    pairs = enumerate(zip(predicted, labels, strict=True))
    return [{"row": row, "prediction": p, "label": v, "loss": loss, "supervised": 1} for row, (p, v) in pairs]


@pytest.mark.parametrize("kind", LABELS)
def test_loss_is_that_of_transformers(kind, tiny_bert):
    task = fitted(kind)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(tiny_bert, **task.model_kwargs()).eval()
    examples = task.encode(rows_of(kind), wordpiece(), DataSpec())
    for part in (examples[:2], examples[2:3], examples):
        batch = task.collate([part], 0)
        with torch.no_grad():
            ours = task.row_losses(model, batch).sum() / batch.supervised
            theirs = model(**batch.inputs, labels=batch.labels).loss
            found = task.metrics(task.predict(model, batch))
        torch.testing.assert_close(ours, theirs)
        assert found["loss"] == pytest.approx(float(theirs), rel=1e-5)
        assert set(found) == set(task.metric_names)


def test_primary_metric_follows_the_kind():
    assert [fitted(k).primary for k in LABELS] == ["accuracy", "micro_f1", "pearson"]
    task = fitted("regression")
    assert not task.metric("mse").maximize and task.metric("pearson").maximize


def test_scores_of_one_class_are_those_of_scikit_learn():
    task = fitted("single_label")
    predicted, labels = [0, 1, 2, 2, 1, 0, 1, 2], [0, 1, 1, 2, 0, 0, 1, 2]
    found = task.metrics(predictions(predicted, labels, 0.5))
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "mcc": matthews_corrcoef(labels, predicted),
        "loss": 0.5,
    }
    assert found == pytest.approx(expected)


def test_scores_of_several_classes_are_those_of_scikit_learn():
    task = fitted("multi_label")
    predicted, labels = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]
    found = task.metrics(predictions(predicted, labels, 1.0))
    expected = {
        "micro_f1": f1_score(labels, predicted, average="micro"),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "subset_accuracy": accuracy_score(labels, predicted),
        "loss": 1.0,
    }
    assert found == pytest.approx(expected)


def test_scores_of_numbers_are_those_of_scipy():
    task = fitted("regression")
    predicted, labels = [0.5, 2.0, 1.0, 4.0, 4.5], [1.0, 2.0, 2.0, 3.0, 5.0]
    found = task.metrics(predictions(predicted, labels, 0.0))
    assert found["pearson"] == pytest.approx(pearsonr(predicted, labels)[0])
    assert found["spearman"] == pytest.approx(spearmanr(predicted, labels)[0])
    assert found["mse"] == pytest.approx(sum((p - v) ** 2 for p, v in zip(predicted, labels, strict=True)) / 5)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_auto_takes_lists_as_several_classes_and_never_guesses_numbers():
    assert fit([{"label": ["a", "b"]}, {"label": ["b"]}, {"label": []}])[0].kind == "multi_label"
    task, problems = fit([{"label": 1.5}, {"label": 2.5}])
    assert problems == [] and task.kind == "single_label" and task.classes == ["1.5", "2.5"]


def test_lists_and_joined_strings_mean_the_same():
    lists = fit([{"label": v.split("|")} for v in LABELS["multi_label"]])[0]
    joined = fitted("multi_label")
    assert lists.classes == joined.classes == ["cat", "cow", "dog"]
    assert joined._target("dog|cat", {}) == lists._target(["cat", "dog"], {}) == [1, 0, 1]
    assert lists._target([], {}) == [0, 0, 0]


def test_words_and_numbers_are_not_mixed():
    assert fit([{"label": "a"}, {"label": 1}])[1] == [
        "data.label_column: words and numbers are mixed: 'a' and 1",
    ]
    assert "mixed" in fit([{"label": ["a"]}, {"label": [1, 2]}])[1][0]


def test_labels_that_do_not_fit_the_kind_are_refused():
    assert "row 2" in fit([{"label": 1}, {"label": "much"}], "regression")[1][0]
    assert "row 1" in fit([{"label": float("nan")}], "regression")[1][0]
    assert "some labels are lists" in fit([{"label": ["a"]}, {"label": ["b"]}], "single_label")[1][0]
    unseen = fit([{"label": "a|b"}], "multi_label", eval=[{"label": "a|c"}])[1]
    assert unseen == ["data.label_column: 1 classes of eval are not in train: 'c'"]


def test_baselines_are_the_trivial_answers():
    for kind, expected in (
        ("single_label", {"majority_accuracy": 3 / 6}),
        ("multi_label", {"majority_subset_accuracy": 1 / 6}),
        ("regression", {"mean_mse": float(torch.tensor([1.5, 2, -0.25, 4, 3, 0]).var(correction=0))}),
    ):
        task = fitted(kind)
        splits = dataset.Data(splits={s: rows_of(kind) for s in dataset.SPLITS}, fingerprint="", name="")
        assert task.baseline(splits, "eval") == pytest.approx(expected)


def test_answers_are_readable():
    assert fitted("single_label").readable({}, {"prediction": 1}) == "cow"
    assert fitted("multi_label").readable({}, {"prediction": [1, 0, 1]}) == "cat|dog"
    assert fitted("regression").readable({}, {"prediction": 1.23456}) == "1.235"


def test_class_weights_weigh_the_training_loss_and_not_the_metric(tiny_bert):
    line = ["task_type=seq_cls", f"model.pretrained={tiny_bert}", *parity.SMALL]
    plain = workload.workload(compose.compose_trial(line))
    weighted = workload.workload(compose.compose_trial([*line, "task_type.class_weights=balanced"]))
    labels = [example.target for example in plain.examples["train"]]
    counts = [labels.count(c) for c in range(len(plain.task.classes))]
    there = sum(n > 0 for n in counts)
    expected = [len(labels) / (there * n) if n else 1.0 for n in counts]
    assert weighted.task.weights == pytest.approx(expected)
    spec = compose.compose_trial(line)
    model = base_model.load(spec.model, spec.train, plain.task, plain.tokenizer).model
    batch = plain.task.collate([plain.examples["train"][:8]], plain.tokenizer.pad_token_id)
    one, other = (work.task.row_losses(model, batch).tolist() for work in (plain, weighted))
    assert other == pytest.approx([loss * expected[c] for loss, c in zip(one, batch.labels.tolist(), strict=True)])
    losses = [[p["loss"] for p in work.task.predict(model, batch)] for work in (plain, weighted)]
    assert losses[0] == losses[1] == pytest.approx(one)


class LastToken(torch.nn.Module):
    """A decoder whose texts share the given part of what its head, which has no bias, reads."""

    device = torch.device("cpu")

    def __init__(self, shared: float) -> None:
        super().__init__()
        self.shared, self.score = shared, torch.nn.Linear(4, 1, bias=False)

    def forward(self, input_ids, attention_mask):
        own_BTD = torch.stack([input_ids % 3 - 1, input_ids % 5 - 2, input_ids % 7 - 3, 0 * input_ids], -1)
        read_BTD = own_BTD + torch.tensor([0, 0, 0, self.shared])
        return transformers.utils.ModelOutput(logits=self.score(read_BTD)[:, -1])


@pytest.mark.parametrize("shared", [1000.0, 1.0])
def test_head_without_a_bias_begins_at_the_mean_or_the_mean_is_added(shared):
    """Years lie 230 deviations from zero: as much as the texts must have in common for the head to hold their mean."""
    years = [{"label": 1990 + i % 30} for i in range(60)]
    task, model = fit(years, "regression")[0], LastToken(shared)
    examples = [Example(i, {"input_ids": [7, i]}, float(r["label"]), 1) for i, r in enumerate(years)]
    for _ in range(2):  # a trial's base may be loaded again
        task.trim(model, ["score.weight"])
        with torch.no_grad():
            starts = task.meet(model, examples, 0)
    targets = torch.cat([task.labels([e], 2) for e in examples])
    assert bool(task.unexported) == (not starts) == (shared == 1)
    assert [n for n in task.notes if "has no bias" in n] == task.notes and len(task.notes) == (shared == 1)
    if shared == 1:
        assert task.unexported == pytest.approx(2004.5) and abs(float(targets.mean())) < 1e-4
        return
    with torch.no_grad():
        model.score.weight.copy_(starts["score.weight"])
        begun = torch.stack([model(**task.collate([[e]], 0).inputs).logits[0, 0] for e in examples])
    assert float((begun - targets).mean()) == pytest.approx(0, abs=0.1)


def test_trial_from_before_the_mean_was_added_answers_as_it_did():
    task = make(TaskSpec(name="SEQ_CLS", problem_type="regression"))
    task.restore({"classes": [], "kind": "regression", "mean": 2004.5, "sd": 8.7, "found": {}})
    task.trim(torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False)), ["0.weight"])
    assert (task.scale, task.offset, task.unexported) == (8.7, 0, 0)
