"""Numbers are learned standardised, and answered in the data's units by whoever loads them."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from support.models import wordpiece

import lorasweep
from lorasweep.cli import main
from lorasweep.serving import predict
from lorasweep.tasks import seq_cls

NUMBERS = [float(1000 + 7 * (i % 13)) for i in range(60)]
TEXT = "text number 5"


def study(folder: Path, model: Path, *more: str) -> Path:
    lines = [f"text number {i},{number}" for i, number in enumerate(NUMBERS)]
    (folder / "a.csv").write_text("\n".join(["text,label", *lines]))
    words = ["data=csv", f"data.path={folder / 'a.csv'}", "task_type.problem_type=regression"]
    words += ["train.max_steps=8", "train.batch_size=8", "train.learning_rate=0.01", "tracking=none", *more]
    assert main.main([*words, f"model.pretrained={model}", f"outputs={folder}", "study=s"]) == 0
    return folder / "s"


def number_of(model, folder: Path) -> float:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.inference_mode():
        return float(model(**tokens).logits[0, 0])


@pytest.mark.parametrize(
    ("family", "added"), [("tiny_bert", False), ("tiny_llama", False), ("tiny_llama", True), ("tiny_t5", False)]
)
def test_exports_answer_in_the_datas_units(family, added, tmp_path, capsys, request, monkeypatch):
    """The head of a Llama has no bias: where it cannot hold the mean, what is to be added is said, also in the card."""
    if added:
        monkeypatch.setattr(seq_cls, "MOST_NOISE", 0)
    model = request.getfixturevalue(family)
    folder = study(tmp_path, model)
    facts = json.loads((folder / "0" / "task.json").read_text())
    assert 1000 < facts["mean"] < 1084 and facts["sd"] == pytest.approx(statistics.pstdev(NUMBERS), rel=0.3)
    expected = predict.answers(predict.load(folder / "0"), [TEXT])[0]["value"]
    assert abs(expected - 1040) < 100, "eight steps do not learn a thousand, mean and deviation do"
    for merged in ("", "--merged"):
        capsys.readouterr()
        place = tmp_path / f"x{merged}"
        assert main.main(["export", str(folder), *([merged] if merged else []), "--to", str(place)]) == 0
        missing = facts["mean"] if added else 0.0
        assert (f"{missing:.6g} is to be added" in capsys.readouterr().out) == bool(missing)
        assert (f"logits[0, 0] + {missing!r}" in (place / "README.md").read_text()) == bool(missing)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "x--merged").eval()
    assert number_of(whole, tmp_path / "x--merged") + missing == pytest.approx(expected, rel=1e-4)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    base.config.pad_token_id = whole.config.pad_token_id
    adapted = PeftModel.from_pretrained(base, tmp_path / "x").eval()
    assert number_of(adapted, tmp_path / "x") + missing == pytest.approx(expected, rel=1e-4)
    best, tokenizer = lorasweep.load_best(folder)
    with torch.inference_mode():
        found = best(**tokenizer(TEXT, return_tensors="pt")).logits
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-4)


def words(folder: Path, numbers: dict[str, float]) -> Path:
    """Write a file whose texts' words tell the number."""
    folder.mkdir(exist_ok=True)
    lines = [f"a {word} text number {i},{number}" for i in range(30) for word, number in numbers.items()]
    (folder / "w.csv").write_text("\n".join(["text,label", *lines]))
    return folder / "w.csv"


def learned(folder: Path, model: Path, data: Path, *more: str) -> Path:
    fixed = ["data=csv", f"data.path={data}", "task_type.problem_type=regression", "tracking=none", "study=s"]
    steps = ["train.max_steps=40", "train.batch_size=8", "train.learning_rate=0.01", f"outputs={folder}"]
    assert main.main([*fixed, *steps, f"model.pretrained={model}", *more]) == 0
    return folder / "s"


YEARS = {"good": 2018.0, "bad": 1993.0, "big": 2010.0, "small": 2001.0}


@pytest.mark.parametrize("noise", [seq_cls.MOST_NOISE, 0.0])
def test_numbers_far_from_zero_are_learned_without_a_bias(noise, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(seq_cls, "MOST_NOISE", noise)
    folder = learned(tmp_path, tiny_llama, words(tmp_path, YEARS))
    result = json.loads((folder / "0" / "result.json").read_text())
    assert result["metrics"]["pearson"] > 0.9 and result["metrics"]["mse"] < 40
    value = predict.answers(predict.load(folder / "0"), ["a good text number 7"])[0]["value"]
    assert abs(value - 2018) < 10


def finished(folder: Path, kind: type, config: transformers.PretrainedConfig, times: float) -> Path:
    """Save a model with a head for one number of its own, of numbers about that many times as large as usual."""
    tokenizer = wordpiece()
    config.vocab_size, config.pad_token_id, config.num_labels = len(tokenizer), tokenizer.pad_token_id, 1
    torch.manual_seed(0)
    model = kind(config)
    head = model.score if hasattr(model, "score") else model.classifier
    torch.nn.init.normal_(head.weight, std=times)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "config", "missing"),
    [
        (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL), False),
        (transformers.LlamaForSequenceClassification, transformers.LlamaConfig(**SMALL), True),
    ],
)
def test_finished_head_of_other_units_begins_at_the_datas(kind, config, missing, tmp_path):
    """A reward model's numbers are around 0, the data's are 0 to 100. This one is random."""
    model = finished(tmp_path / "m", kind, config, 0.02)
    data = words(tmp_path, {"good": 90.0, "bad": 10.0, "big": 60.0, "small": 40.0})
    folder = learned(tmp_path, model, data)
    result = json.loads((folder / "0" / "result.json").read_text())
    assert result["metrics"]["pearson"] > 0.8 and result["metrics"]["mse"] < result["baseline"]["mean_mse"]
    notes = json.loads((folder / "0" / "run.json").read_text())["data"]["notes"]
    assert any("the base's own head gives numbers around" in n and "and the data have 4" in n for n in notes)
    assert any("is added to what the model gives" in n for n in notes) == missing
    text = "a good text number 7"
    expected = predict.answers(predict.load(folder / "0"), [text])[0]["value"]
    assert main.main(["export", str(folder), "--merged", "--to", str(tmp_path / "x")]) == 0
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "x").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")(text, return_tensors="pt")
    more = json.loads((folder / "0" / "task.json").read_text())["offset"] if missing else 0.0
    with torch.inference_mode():
        assert float(whole(**tokens).logits[0, 0]) + more == pytest.approx(expected, rel=1e-4)
    best, tokenizer = lorasweep.load_best(folder)
    with torch.inference_mode():
        assert float(best(**tokenizer(text, return_tensors="pt")).logits[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_mse_is_in_the_datas_units_and_loss_in_deviations(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert)
    facts = json.loads((folder / "0" / "task.json").read_text())
    metrics = json.loads((folder / "0" / "result.json").read_text())["metrics"]
    assert metrics["mse"] == pytest.approx(metrics["loss"] * facts["sd"] ** 2, rel=1e-3)
