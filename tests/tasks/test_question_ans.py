"""QUESTION_ANS: windows whose offsets lead back to the text, transformers' loss, SQuAD's and CMRC's scores."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from support import real_data
from support.models import wordpiece

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data import dataset, readers
from lorasweep.errors import ConfigError
from lorasweep.tasks import make
from lorasweep.tasks.question_ans import (
    MAX_ANSWER_TOKENS,
    QuestionAns,
    best_spans,
    cmrc_tokens,
    counts_characters,
    score,
    squad_normal,
)

XQUAD = real_data.FOLDER / "xquad"
ENGLISH = (
    "The Panthers defence gave up just 308 points, ranking sixth in the league, while also leading the NFL in "
    "interceptions with 24 and boasting four Pro Bowl selections. Linebacker Luke Kuechly was a café regular."
)
CHINESE = "黑豹队的防守只丢了 308分，在联赛中排名第六，同时也以 24 次拦截领先国家橄榄球联盟 (NFL)，并且四次入选职业碗。"  # noqa: RUF001


def row(question: str, context: str, *texts: str) -> dict:
    answers = [{"text": t, "start": context.index(t)} for t in texts]
    return {"question": question, "context": context, "answers": answers}


ROWS = [
    row("How many points?", ENGLISH, "308"),
    row("Who was a regular?", ENGLISH, "Luke Kuechly"),
    row("What drink?", ENGLISH, "café"),
    row("丢了多少分?", CHINESE, "308分"),
    row("排名第几?", CHINESE, "第六"),
    row("领先什么?", CHINESE, "国家橄榄球联盟"),
]


def fitted(rows=ROWS) -> QuestionAns:
    task = make(TaskSpec(name="QUESTION_ANS"))
    assert isinstance(task, QuestionAns)
    assert task.fit(dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="")) == []
    return task


def recovered(rows: list[dict], spec: DataSpec) -> tuple[int, int]:
    """Return for how many rows a labelled span is the answer, and for how many it holds the answer."""
    exact, held = set(), set()
    for e in fitted(rows).encode(rows, wordpiece(), spec):
        start, end = e.target
        if start == e.info.null:
            continue
        answer, found = rows[e.row]["answers"][0]["text"], e.info.text(start, end)
        exact |= {e.row} if found == answer else set()
        held |= {e.row} if answer.strip() in found else set()
    return len(exact), len(held)


@pytest.mark.parametrize("max_tokens", [128, 40, 24])
def test_every_answer_is_found_again_in_english_and_chinese(max_tokens):
    assert recovered(ROWS, DataSpec(max_tokens=max_tokens, doc_stride=8)) == (len(ROWS), len(ROWS))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_answer_of_xquad_is_found_again(language):
    path = XQUAD / f"xquad.{language}.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    spec = DataSpec(source="squad", path=str(path), max_tokens=384)
    found = dataset.load(spec, fitted().columns(spec), "QUESTION_ANS")
    titles = [{r["group"] for r in rows} for rows in found.splits.values()]
    assert all(titles) and sum(map(len, titles)) == 48
    rows = [r for split in found.splits.values() for r in split][:400]
    exact, held = recovered(rows, spec)
    assert held == len(rows) and exact >= 0.97 * len(rows)


def test_windows_overlap_by_the_stride_and_cover_the_context():
    examples = fitted().encode(ROWS[:1], wordpiece(), DataSpec(max_tokens=24, doc_stride=6))
    assert len(examples) > 2 and all(len(e) <= 24 for e in examples)
    places = [[p for p in e.info.offsets if p] for e in examples]
    assert all(a[-6:] == b[:6] for a, b in pairwise(places))
    covered = {i for window in places for a, b in window for i in range(a, b)}
    assert covered == {i for i, c in enumerate(ENGLISH) if not c.isspace()}
    labelled = [e for e in examples if e.target != (0, 0)]
    assert labelled and all(e.info.text(*e.target) == "308" for e in labelled)
    assert all(
        "308" not in ENGLISH[p[0][0] : p[-1][1]] for e, p in zip(examples, places, strict=True) if e.target[0] == 0
    )


def test_long_question_and_large_stride_leave_room_for_the_context():
    rows = [row("why " * 500, ENGLISH, "308"), row("Who?", ENGLISH, "Luke Kuechly")]
    examples = fitted().encode(rows, wordpiece(), DataSpec(max_tokens=32, doc_stride=1000))
    assert {e.row for e in examples} == {0, 1} and max(len(e) for e in examples) <= 32
    assert [e.row for e in examples] == sorted(e.row for e in examples)
    with pytest.raises(ConfigError, match="leave 4 tokens"):
        fitted().encode(rows, wordpiece(), DataSpec(max_tokens=6))


@pytest.fixture(scope="module")
def model(tiny_bert):
    torch.manual_seed(1)
    return transformers.BertForQuestionAnswering.from_pretrained(tiny_bert).eval()


def test_loss_is_that_of_transformers(model):
    task, tokenizer = fitted(), wordpiece()
    examples = task.encode(ROWS, tokenizer, DataSpec(max_tokens=24, doc_stride=8))
    whole = [e for e in examples if len(e) == 24]
    for batch in (task.collate([whole[i : i + 4]], tokenizer.pad_token_id) for i in (0, 4, 8)):
        want = model(**batch.inputs, start_positions=batch.labels[:, 0], end_positions=batch.labels[:, 1]).loss
        torch.testing.assert_close(task.row_losses(model, batch).mean(), want)


def test_padding_has_no_share_in_a_windows_loss(model):
    task, tokenizer = fitted(), wordpiece()
    examples = task.encode(ROWS, tokenizer, DataSpec())
    assert len({len(e) for e in examples}) > 1
    together = task.row_losses(model, task.collate([examples], tokenizer.pad_token_id))
    for e, loss in zip(examples, together, strict=True):
        alone = task.collate([[e]], tokenizer.pad_token_id)
        want = model(**alone.inputs, start_positions=alone.labels[:, 0], end_positions=alone.labels[:, 1]).loss
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


def test_best_span_is_the_best_of_all_valid_ones():
    torch.manual_seed(0)
    starts, ends = torch.randn(3, 50), torch.randn(3, 50)
    context = torch.rand(3, 50) < 0.7
    context[2] = False
    scores, first, last = best_spans(starts, ends, context)
    for b in range(2):
        valid = [
            (float(starts[b, i] + ends[b, j]), i, j)
            for i in range(50)
            for j in range(i, min(50, i + MAX_ANSWER_TOKENS))
            if context[b, i] and context[b, j]
        ]
        assert (float(scores[b]), int(first[b]), int(last[b])) == max(valid)
    assert scores[2] == float("-inf")


def test_predictions_are_spans_of_the_context_and_scored_by_row(model):
    task, tokenizer = fitted(), wordpiece()
    examples = task.encode(ROWS, tokenizer, DataSpec(max_tokens=24, doc_stride=8))
    found = task.predict(model, task.collate([examples], tokenizer.pad_token_id))
    assert all(p["prediction"] in ROWS[p["row"]]["context"] for p in found)
    assert task.answers(found).keys() == set(range(len(ROWS)))
    metrics = task.metrics(found)
    assert tuple(metrics) == task.metric_names and all(0 <= metrics[m] <= 1 for m in ("f1", "exact_match"))


def window(text: str, at: float, null: float, *answers: str, number: int = 0) -> dict:
    facts = {"row": number, "loss": 1.0, "supervised": 1, "answers": answers, "by_character": False}
    return facts | {"prediction": text, "score": at, "null_score": null}


def test_best_window_wins_and_the_least_null_score_silences_it():
    task = fitted([*ROWS, row("Unknown?", ENGLISH)])
    assert task.may_abstain
    assert task.answers([window("a", 1, 9), window("b", 3, 2)]) == {0: "b"}
    assert task.answers([window("a", 1, 9), window("b", 3, 4)]) == {0: ""}
    assert task.answers([window("a", 3, 3)]) == {0: "a"}
    silent = task.metrics([window("a", 1, 9), window("cat", 1, 9, "cat", number=1)])
    assert silent == {"f1": 0.5, "exact_match": 0.5, "loss": 1.0}
    assert fitted().answers([window("a", 1, 9)]) == {0: "a"}


@pytest.mark.parametrize(
    ("predicted", "answers", "f1", "exact"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("a black cat", ["cat", "the black dog"], 2 / 3, 0),
        ("cat cat", ["cat"], 2 / 3, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
    ],
)
def test_squad_scores_worked_by_hand(predicted, answers, f1, exact):
    assert score(predicted, answers, False) == pytest.approx((f1, exact))


@pytest.mark.parametrize(
    ("predicted", "answers", "f1", "exact"),
    [
        ("308分", ["308"], 2 / 3, 0),
        ("《战国无双3》", ["战国无双3"], 1, 1),
        ("光荣和ω-force", ["光荣和ω-force", "光荣"], 1, 1),
        ("任天堂游戏谜之村雨城", ["村雨城"], 6 / 13, 0),
        ("北京和上海", ["北京上海"], 4 / 9, 0),
        ("", [], 1, 1),
        ("", ["北京"], 0, 0),
    ],
)
def test_cmrc_scores_worked_by_hand(predicted, answers, f1, exact):
    assert score(predicted, answers, True) == pytest.approx((f1, exact))


def test_chinese_text_is_divided_by_characters_and_words():
    assert cmrc_tokens("第 308分,NFL 联盟") == ["第", "308", "分", ",nfl", "联", "盟"]
    assert counts_characters(CHINESE) and not counts_characters(ENGLISH + " 黑豹")
    assert squad_normal("An  A-Team, the\tend.") == "ateam end"


def test_few_misplaced_answers_are_left_out_with_a_note_and_many_refused():
    wrong = ROWS[0] | {"answers": [{"text": "308", "start": 1}]}
    task = fitted([*ROWS * 4, wrong])
    assert "1 of 25 records of train" in task.notes[0] and "'308' at 1" in task.notes[0]
    examples = task.encode([wrong, ROWS[0]], wordpiece(), DataSpec())
    assert {e.row for e in examples} == {1}
    half = wrong | {"answers": [*wrong["answers"], *ROWS[0]["answers"]]}
    assert task.encode([half], wordpiece(), DataSpec())[0].info.answers == ("308",)
    rows = [*ROWS, wrong, wrong]
    problems = make(TaskSpec(name="QUESTION_ANS")).fit(
        dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="")
    )
    assert len(problems) == 3 and "at most 5% may" in problems[0]


def squad(folder: Path, content) -> list[dict]:
    path = folder / "dev.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf8")
    return readers.read_splits(DataSpec(source="squad", path=str(path)))["train"].rows


def test_squad_file_gives_one_row_a_question(tmp_path):
    asked = {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], "id": "1"}
    unknown = {"question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]}
    found = squad(
        tmp_path, {"data": [{"title": "T", "paragraphs": [{"context": "Ann left.", "qas": [asked, unknown]}]}]}
    )
    assert found == [
        {"question": "Who?", "context": "Ann left.", "answers": asked["answers"], "group": "T"},
        {"question": "Why?", "context": "Ann left.", "answers": [], "group": "T"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a SQuAD file"),
        ([], "not a SQuAD file"),
        ({"version": "1.1"}, "not a SQuAD file"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, "article 1 is not paragraphs .*qas"),
        ({"data": ["x"]}, "article 1 is not"),
        ({"data": 5}, "not a SQuAD file"),
    ],
)
def test_broken_squad_file_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        squad(tmp_path, content)


def test_columns_take_both_forms_of_answers_and_keep_a_context_together(tmp_path):
    path = tmp_path / "train.jsonl"
    forms = [
        {"text": ["b"], "answer_start": [2]},
        {"text": [], "answer_start": []},
        [{"text": "b", "start": 2}],
        [{"text": "b", "answer_start": 2}],
        [],
    ]
    rows = [{"q": f"q{i}", "context": f"a b {i // 5}", "answers": forms[i % 5]} for i in range(300)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    spec = DataSpec(source="jsonl", path=str(path), question_column="q")
    found = dataset.load(spec, fitted().columns(spec), "QUESTION_ANS")
    contexts = [{r["context"] for r in split} for split in found.splits.values()]
    assert sum(map(len, contexts)) == 60 and "hash of the context" in found.notes[0]
    every = [r for split in found.splits.values() for r in split]
    assert {json.dumps(r["answers"]) for r in every} == {"[]", '[{"text": "b", "start": 2}]'}
    spec = DataSpec(source="jsonl", path=str(path), question_column="q", group_column="q")
    assert "hash of the group" in dataset.load(spec, fitted().columns(spec) | {"group": "q"}, "QUESTION_ANS").notes[0]


@pytest.mark.parametrize("answers", [{"text": ["b"]}, {"text": ["b"], "answer_start": []}, [{"text": "b"}], [3]])
def test_answers_in_no_known_form_are_refused_by_row(tmp_path, answers):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "q", "context": "a b", "answers": answers}))
    spec = DataSpec(source="jsonl", path=str(path))
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: 'answers' "):
        dataset.load(spec, fitted().columns(spec), "QUESTION_ANS")


def test_built_in_rows_have_their_answer_in_place_and_no_module_on_two_sides():
    found = dataset.load(DataSpec(), {}, "returned")
    rows = [r for split in found.splits.values() for r in split]
    assert len(rows) >= 200
    assert all(r["context"].startswith(a["text"], a["start"]) for r in rows for a in r["answers"])
    groups = [{r["group"] for r in split} for split in found.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
