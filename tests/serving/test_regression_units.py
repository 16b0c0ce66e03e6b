"""Numbers are learned standardised, and answered in the data's units by whoever loads them."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

import lorasweep
from lorasweep.cli import main
from lorasweep.serving import predict

NUMBERS = [float(1000 + 7 * (i % 13)) for i in range(60)]
TEXT = "text number 5"


def study(folder: Path, model: Path) -> Path:
    lines = [f"text number {i},{number}" for i, number in enumerate(NUMBERS)]
    (folder / "a.csv").write_text("\n".join(["text,label", *lines]))
    words = ["data=csv", f"data.path={folder / 'a.csv'}", "task_type.problem_type=regression"]
    words += ["train.max_steps=8", "train.batch_size=8", "train.learning_rate=0.01", "tracking=none"]
    assert main.main([*words, f"model.pretrained={model}", f"outputs={folder}", "study=s"]) == 0
    return folder / "s"


def number_of(model, folder: Path) -> float:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.inference_mode():
        return float(model(**tokens).logits[0, 0])


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama"])
def test_exports_answer_in_the_datas_units(family, tmp_path, request):
    """The head of a Llama has no bias: there the mean stays in what is learned."""
    model = request.getfixturevalue(family)
    folder = study(tmp_path, model)
    facts = json.loads((folder / "0" / "task.json").read_text())
    assert 1000 < facts["mean"] < 1084 and facts["sd"] == pytest.approx(statistics.pstdev(NUMBERS), rel=0.3)
    expected = predict.answers(predict.load(folder / "0"), [TEXT])[0]["value"]
    if family == "tiny_bert":
        assert abs(expected - 1040) < 100, "eight steps do not learn a thousand, mean and deviation do"
    for merged in ("", "--merged"):
        assert (
            main.main(["export", str(folder), *([merged] if merged else []), "--to", str(tmp_path / f"x{merged}")]) == 0
        )
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "x--merged").eval()
    assert number_of(whole, tmp_path / "x--merged") == pytest.approx(expected, rel=1e-4)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    base.config.pad_token_id = whole.config.pad_token_id
    adapted = PeftModel.from_pretrained(base, tmp_path / "x").eval()
    assert number_of(adapted, tmp_path / "x") == pytest.approx(expected, rel=1e-4)
    best, tokenizer = lorasweep.load_best(folder)
    with torch.inference_mode():
        found = best(**tokenizer(TEXT, return_tensors="pt")).logits
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_mse_is_in_the_datas_units_and_loss_in_deviations(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert)
    facts = json.loads((folder / "0" / "task.json").read_text())
    metrics = json.loads((folder / "0" / "result.json").read_text())["metrics"]
    assert metrics["mse"] == pytest.approx(metrics["loss"] * facts["sd"] ** 2, rel=1e-3)
