"""Schemes of tags: recognised in what people have, and read strictly, as seqeval reads them."""

import random

import pytest
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, IOE2, Entities

from lorasweep.config.spec import TaskSpec
from lorasweep.data import dataset
from lorasweep.tasks import make, tag_schemes

SPANS = [
    ("PER", 0, 2),
    ("PER", 2, 3),
    ("LOC", 3, 4),
    ("ORG", 5, 9),
]
"""Two of one type side by side, then another type at once, then a long one."""

WRITTEN = {
    "IOB1": "I-PER I-PER B-PER I-LOC O I-ORG I-ORG I-ORG I-ORG O",
    "IOB2": "B-PER I-PER B-PER B-LOC O B-ORG I-ORG I-ORG I-ORG O",
    "IOE1": "I-PER E-PER I-PER I-LOC O I-ORG I-ORG I-ORG I-ORG O",
    "IOE2": "I-PER E-PER E-PER E-LOC O I-ORG I-ORG I-ORG E-ORG O",
    "IOBES": "B-PER E-PER S-PER S-LOC O B-ORG I-ORG I-ORG E-ORG O",
    "BILOU": "B-PER L-PER U-PER U-LOC O B-ORG I-ORG I-ORG L-ORG O",
}


@pytest.mark.parametrize("scheme", WRITTEN)
def test_scheme_is_recognised_and_its_entities_are_read(scheme):
    tags = WRITTEN[scheme].split()
    assert tag_schemes.recognise([["O"], tags]) == scheme
    assert tag_schemes.entities(tags, scheme) == SPANS
    assert tag_schemes.unmarked(tags, scheme) == 0


@pytest.mark.parametrize("scheme", WRITTEN)
def test_perfect_tags_of_any_scheme_score_one(scheme):
    task = make(TaskSpec(name="TOKEN_CLS"))
    tags = WRITTEN[scheme].split()
    rows = [{"tokens": list("abcdefghij"), "tags": tags}]
    assert task.fit(dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="")) == []
    assert task.notes == [f"the tags mark entities as {scheme} does: they are scored strictly by it"]
    found = {"row": 0, "loss": 1.0, "supervised": 10, "prediction": tags, "label": tags}
    assert task.metrics([found]) == {"f1": 1, "precision": 1, "recall": 1, "accuracy": 1, "loss": 0.1}


@pytest.mark.parametrize(
    ("scheme", "theirs", "letters"),
    [
        ("IOB1", IOB1, "BI"),
        ("IOB2", IOB2, "BI"),
        ("IOE2", IOE2, "IE"),
        ("IOBES", IOBES, "BIES"),
        ("BILOU", BILOU, "BILU"),
    ],
)
def test_entities_are_seqevals_on_random_tags(scheme, theirs, letters):
    draw = random.Random(0)
    tags = ["O", *(f"{letter}-{kind}" for letter in letters for kind in ("x", "y"))]
    rows = [[draw.choice(tags) for _ in range(draw.randint(1, 9))] for _ in range(2000)]
    expected = [[(e.tag, e.start, e.end) for e in row] for row in Entities(rows, scheme=theirs).entities]
    assert [tag_schemes.entities(row, scheme) for row in rows] == expected


def test_first_ioe_is_the_first_iob_from_the_end():
    """seqeval says itself that it does not read IOE1 rightly."""
    draw = random.Random(0)
    for _ in range(500):
        row = [draw.choice(["O", "I-x", "E-x", "I-y", "E-y"]) for _ in range(draw.randint(1, 9))]
        turned = [t.replace("E-", "B-") for t in reversed(row)]
        spans = [(k, len(row) - e, len(row) - s) for k, s, e in tag_schemes.entities(turned, "IOB1")]
        assert tag_schemes.entities(row, "IOE1") == spans[::-1]


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("NOUN VERB ADJ", None),
        ("PRP$ -LRB- , I", None),
        ("O", None),
        ("per loc O", None),
        ("B-PER X-PER O", None),
        ("B M E S B E", "IOBES"),
        ("B-x M-x E-x S-x", "IOBES"),
        ("B-x M-x E-x W-x", "IOBES"),
        ("B I I O", "IOB2"),
        ("I E O", None),
        ("I-x I-x O", "IOB1"),
        ("B-x O B-y", "IOB2"),
        ("S-x O", "IOBES"),
        ("U-x O B-y L-y", "BILOU"),
        ("E-x O E-y", "IOE2"),
        ("B-x I-x O I-y O B-y I-y O B-x", "IOB2"),
        ("I-x O I-y O B-y O I-x I-x O I-y", "IOB1"),
        ("b-x i-x o b-y", "IOB2"),
        ("B_x I_x O B_y", "IOB2"),
        ("x-B x-E O y-S", "IOBES"),
        ("noun-a verb-x", None),
    ],
)
def test_scheme_by_what_the_tags_do(tags, scheme):
    assert tag_schemes.recognise([tags.split()]) == scheme


@pytest.mark.parametrize("scheme", WRITTEN)
@pytest.mark.parametrize(
    "other",
    [str.lower, lambda tag: tag.replace("-", "_"), lambda tag: "-".join(reversed(tag.split("-")))],
    ids=["small letters", "line below", "mark behind"],
)
def test_marks_may_be_written_otherwise(scheme, other):
    tags = [other(tag) for tag in WRITTEN[scheme].split()]
    assert tag_schemes.recognise([tags]) == scheme
    assert [(kind.upper(), *place) for kind, *place in tag_schemes.entities(tags, scheme)] == SPANS
    assert tag_schemes.unmarked(tags, scheme) == 0


def test_tags_that_only_rows_left_out_have_tell_the_scheme():
    """data.max_train_samples may leave out the few sentences that have an E or an S."""
    task, rows = make(TaskSpec(name="TOKEN_CLS")), [{"tokens": ["a", "b"], "tags": ["B-x", "O"]}]
    data = dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="", labels=("E-x", "S-x"))
    assert task.fit(data) == []
    assert task.scheme == "IOBES"


def test_type_may_hold_a_dash():
    assert tag_schemes.entities(["B-a-b", "I-a-b", "I-a"], "IOB2") == [("a-b", 0, 2)]


def test_words_of_a_segmentation_are_entities_without_a_type():
    assert tag_schemes.entities(["B", "E", "S", "B", "M", "E"], "IOBES") == [("", 0, 2), ("", 2, 3), ("", 3, 6)]
