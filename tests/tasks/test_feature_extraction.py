"""FEATURE_EXTRACTION: losses by hand, slots that do not see each other, ranks, and the STS benchmark's files."""

import json
import shutil

import pytest
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from support import real_data
from support.models import wordpiece
from torch.nn.functional import cosine_similarity, cross_entropy

from lorasweep.config import compose
from lorasweep.config.spec import DataSpec, ModelSpec, TaskSpec, TrainSpec
from lorasweep.data import builtin, dataset
from lorasweep.errors import ConfigError
from lorasweep.tasks import feature_extraction, make
from lorasweep.tasks.feature_extraction import FeatureExtraction, search_losses, search_ranks
from lorasweep.training import workload

STSB = real_data.FOLDER / "stsb"
SEARCH = [
    {"anchor": "Open a file", "positive": "os open (path, flags)", "negative": "close"},
    {"anchor": "Close it again", "positive": "io close", "negative": "open"},
    {"anchor": "Return the sum of many numbers", "positive": "math fsum (seq)", "negative": "product"},
    {"anchor": "Sleep", "positive": "time sleep (seconds)", "negative": "wake up soon"},
]
PAIRS = [
    {"text": "A plane takes off.", "text_pair": "An air plane is taking off.", "score": "5.0"},
    {"text": "A man plays a flute.", "text_pair": "A dog barks.", "score": "1.0"},
    {"text": "A man is cutting bread.", "text_pair": "Someone is slicing some bread.", "score": "4"},
]


def fitted(rows, spec: DataSpec | None = None, **keys) -> FeatureExtraction:
    task = make(TaskSpec(name="FEATURE_EXTRACTION", **keys))
    assert isinstance(task, FeatureExtraction)
    task.columns(spec or (scored_spec() if "score" in rows[0] else DataSpec()))
    assert task.fit(dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="here")) == []
    return task


def scored_spec() -> DataSpec:
    return DataSpec(score_column="score", text_pair_column="text_pair")


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return transformers.AutoModel.from_pretrained(tiny_bert).eval()


def embed(bert, texts) -> torch.Tensor:
    out = []
    for text in texts:
        hidden = bert(**wordpiece()(text, return_tensors="pt")).last_hidden_state[0]
        out.append(hidden.mean(0))
    return torch.stack(out)


def test_pair_loss_is_the_squared_error_of_the_cosine(bert):
    task = fitted(PAIRS)
    batch = task.collate([task.encode(PAIRS, wordpiece(), scored_spec())], 0)
    cosines = cosine_similarity(*(embed(bert, [r[n] for r in PAIRS]) for n in ("text", "text_pair")))
    with torch.no_grad():
        torch.testing.assert_close(task.row_losses(bert, batch), (cosines - torch.tensor([1.0, 0.0, 0.75])) ** 2)


def test_search_loss_is_the_softmax_over_positives_and_negatives_of_the_group(bert):
    task = fitted(SEARCH, DataSpec(negative_column="negative"), temperature=0.1)
    examples = task.encode(SEARCH, wordpiece(), DataSpec(negative_column="negative"))
    batch = task.collate([examples[:2], examples[2:]], 0)
    with torch.no_grad():
        ours = task.row_losses(bert, batch)
        for rows in (slice(0, 2), slice(2, 4)):
            anchors, *others = (embed(bert, [r[n] for r in SEARCH[rows]]) for n in ("anchor", "positive", "negative"))
            cosines = cosine_similarity(anchors[:, None], torch.cat(others)[None], dim=-1)
            theirs = cross_entropy(cosines / 0.1, torch.arange(2), reduction="none")
            torch.testing.assert_close(ours[rows], theirs, rtol=1e-4, atol=1e-5)


def test_groups_do_not_cross(bert):
    task = fitted(SEARCH)
    examples = task.encode(SEARCH, wordpiece(), DataSpec())
    both = task.collate([examples[:2], examples[2:]], 0)
    with torch.no_grad():
        alone = torch.cat([task.row_losses(bert, task.collate([part], 0)) for part in (examples[:2], examples[2:])])
        torch.testing.assert_close(task.row_losses(bert, both), alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(task.row_losses(bert, task.collate([examples], 0)), alone)


def test_same_text_elsewhere_does_not_count_against_an_anchor():
    vectors = torch.eye(3)[[0, 1, 0]]
    infos = [("a", "p"), ("b", "q"), ("c", "p")]
    losses = search_losses([vectors, vectors], infos, 1.0)
    two_left = cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert losses[0] == pytest.approx(float(two_left)) and losses[2] == pytest.approx(float(two_left))


def test_padding_and_the_batch_do_not_change_a_vector(bert):
    task = fitted(SEARCH)
    examples = task.encode(SEARCH, wordpiece(), DataSpec())
    with torch.no_grad():
        together = feature_extraction.embeddings(bert, task.collate([examples], 0))
        for i, example in enumerate(examples):
            alone = feature_extraction.embeddings(bert, task.collate([[example]], 0))
            for ours, theirs in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[i], theirs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("way", "place"), [("cls", 0), ("last", -1)])
def test_first_or_last_token_makes_the_vector_on_either_side_of_the_padding(way, place, side):
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    found = feature_extraction.pooled(hidden, mask, way)
    for row in range(2):
        torch.testing.assert_close(found[row], hidden[row][mask[row].bool()][place])


def test_checkpoint_says_how_vectors_are_made_and_what_stands_before_texts(tiny_bert, tmp_path):
    """Its prompts go before anchors and positives, its pooling makes the vectors, and the trial's state holds both."""
    place = tmp_path / "model"
    shutil.copytree(tiny_bert, place)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    said = {"prompts": {"query": "search ", "document": "text of "}}
    (place / "config_sentence_transformers.json").write_text(json.dumps(said))
    words = ["task_type=feature_extraction", f"model.pretrained={place}", f"outputs={tmp_path}"]
    words += ["data.max_train_samples=16", "data.max_eval_samples=8"]
    work = workload.workload(compose.compose_trial(words))
    assert work.task.pooling == "cls"
    assert work.task.found["anchor_prefix"] == "search " and work.task.found["positive_prefix"] == "text of "
    assert any("model.pooling=cls" in note for note in work.data.notes)
    first = work.examples["train"][0]
    assert work.tokenizer.decode(first.inputs["input_ids"], skip_special_tokens=True).startswith("search")
    plain = workload.workload(compose.compose_trial([*words, "data.anchor_prefix=''", "model.pooling=mean"]))
    assert plain.task.pooling == "mean" and plain.task.found.get("anchor_prefix", "") == ""
    assert len(plain.examples["train"][0]) < len(first)
    with pytest.raises(ConfigError, match="a head reads model or mean"):
        workload.workload(compose.compose_trial([f"model.pretrained={place}", "model.pooling=last", *words[2:]]))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    positives = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    assert search_ranks(anchors, positives, [("a", "p"), ("b", "q"), ("c", "r")]).tolist() == [2, 1, 3]


def test_equal_vectors_find_nothing():
    same = torch.ones(4, 2)
    assert search_ranks(same, same, [(i, i) for i in range(4)]).tolist() == [4] * 4


def test_repeated_texts_are_one_candidate_and_an_anchors_other_answers_do_not_count():
    anchors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.8, 0.6]])
    infos = [("a", "p"), ("a", "q"), ("b", "p")]
    assert search_ranks(anchors, positives, infos).tolist() == [1, 1, 1]


def test_metrics_do_not_depend_on_the_batches(bert, monkeypatch):
    monkeypatch.setattr(feature_extraction, "EVAL_ROWS", 3)
    task = fitted(SEARCH)
    examples = task.encode(SEARCH, wordpiece(), DataSpec())
    with torch.inference_mode():
        once = task.predict(bert, task.collate([examples], 0))
        parts = [p for i in range(0, 4, 2) for p in task.predict(bert, task.collate([examples[i : i + 2]], 0))]
    assert task.metrics(once) == pytest.approx(task.metrics(parts), rel=1e-4)
    assert set(task.metrics(once)) == set(task.metric_names)
    assert task.primary == "recall_at_1"


def test_correlations_are_those_of_scipy():
    task = fitted(PAIRS)
    random = torch.Generator().manual_seed(0)
    cosines = torch.rand(50, generator=random)
    scores = (cosines + torch.rand(50, generator=random)).mul(5).round()
    rows = [
        {"row": row, "cosine": c, "score": s, "loss": 1.0, "supervised": 1}
        for row, (c, s) in enumerate(zip(cosines.tolist(), scores.tolist(), strict=True))
    ]
    found = task.metrics(rows)
    assert task.primary == "spearman"
    assert found["spearman"] == pytest.approx(spearmanr(cosines, scores)[0], abs=1e-5)
    assert found["pearson"] == pytest.approx(pearsonr(cosines, scores)[0], abs=1e-5)


# --- data and model --------------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_or_all_the_same_are_refused():
    task = make(TaskSpec(name="FEATURE_EXTRACTION"))
    task.columns(scored_spec())
    for rows, problem in (
        ([PAIRS[0] | {"score": "high"}], "must hold finite numbers, train has 'high' in its row 1"),
        (PAIRS[:1], "train needs different scores, all are 5"),
        (SEARCH, "here has no scores"),
    ):
        found = task.fit(dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="here"))
        assert len(found) >= 1 and problem in found[0]


def test_score_needs_a_second_text():
    assert any("data.text_pair_column: must be given" in p for p in DataSpec(score_column="score").problems())


def test_pooler_is_taken_off_and_an_encoder_decoder_is_refused(tiny_bert):
    from lorasweep.models import base_model

    task = make(TaskSpec(name="FEATURE_EXTRACTION"))
    base = base_model.load(ModelSpec(pretrained=str(tiny_bert)), TrainSpec(device="cpu"), task, wordpiece())
    assert base.model.pooler is None and base.missing == ()
    config = transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="takes no encoder-decoder"):
        task.trim(transformers.T5Model(config))


def test_builtin_rows_have_distinct_anchors_and_positives():
    rows = builtin.described()
    assert len(rows) > 1000
    assert len({r["positive"] for r in rows}) == len({r["anchor"] for r in rows}) == len(rows)


@real_data.needs("stsb")
def test_sts_benchmark_is_read_in_full():
    spec = DataSpec(
        source="csv",
        path=str(STSB),
        delimiter="tab",
        quoting=False,
        header=["genre", "file", "year", "id", "score", "sentence1", "sentence2"],
        train_split="sts-train",
        eval_split="sts-dev",
        test_split="sts-test",
        score_column="score",
        text_column="sentence1",
        text_pair_column="sentence2",
    )
    task = make(TaskSpec(name="FEATURE_EXTRACTION"))
    found = dataset.load(spec, task.columns(spec), task.name)
    assert [len(found.splits[s]) for s in dataset.SPLITS] == [5749, 1500, 1379]
    assert task.fit(found) == []
    first = {"text": "A plane is taking off.", "text_pair": "An air plane is taking off.", "score": 5.0}
    assert found.splits["train"][0] == first


def test_csv_cells_beyond_the_header_line_are_refused_and_beyond_a_given_header_left_out(tmp_path):
    (tmp_path / "train.csv").write_text('a,"b,c",d\n' * 40, encoding="utf8")
    keys = {"source": "csv", "path": str(tmp_path), "header": ["text", "label"]}
    rows = dataset.load(
        DataSpec(**keys, eval_split="train", test_split="train"), {"text": "text", "label": "label"}, "X"
    )
    assert rows.splits["train"][0] == {"text": "a", "label": "b,c"}
    (tmp_path / "train.csv").write_text("text,label\na,b,c\n", encoding="utf8")
    with pytest.raises(ConfigError, match=r"train\.csv:2: 3 cells, the header has 2"):
        dataset.load(DataSpec(**(keys | {"header": None})), {"text": "text"}, "X")
