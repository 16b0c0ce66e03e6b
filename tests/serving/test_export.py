"""An exported folder: plain peft or plain transformers load it, and its card is what a hub reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from support import models

import lorasweep
from lorasweep.cli import main
from lorasweep.serving import export, winner
from lorasweep.study import answer, wording
from lorasweep.study.study import Study

SMALL = [
    "train.max_steps=3",
    "train.batch_size=8",
    "train.learning_rate=0.02",
    "data.max_train_samples=64",
    "data.max_eval_samples=32",
    "tracking=none",
]
TEXT = "Open a socket"


def study(outputs: Path, model: Path, *overrides: str) -> Path:
    assert main.main([f"model.pretrained={model}", *SMALL, *overrides, f"outputs={outputs}", "study=s"]) == 0
    return outputs / "s"


@pytest.fixture(scope="module")
def classified(tiny_bert, tmp_path_factory) -> Path:
    return study(tmp_path_factory.mktemp("export"), tiny_bert, "model.pooling=model", "lora.use_dora=true")


def logits(model, folder: Path) -> torch.Tensor:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.inference_mode():
        return model(**tokens).logits


def adapted(folder: Path) -> torch.Tensor:
    loaded = winner.load(folder / "0")
    with torch.inference_mode():
        return loaded.model(**loaded.tokenizer(TEXT, return_tensors="pt")).logits


def test_adapter_loads_with_plain_peft(classified, tiny_bert, tmp_path, capsys):
    assert main.main(["export", str(classified), "--to", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    classes = winner.load(classified / "0").task.model_kwargs()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, **classes)
    found = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.equal(logits(found, tmp_path / "out"), adapted(classified))


def test_adapter_on_plain_peft_tells_question_from_context(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert, "task_type=question_ans")
    assert main.main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    base = transformers.AutoModelForQuestionAnswering.from_pretrained(tiny_bert)
    found, trial = PeftModel.from_pretrained(base, tmp_path / "out").eval(), winner.load(folder / "0")
    tokens = trial.tokenizer("Which module?", "The module io opens files", return_tensors="pt")
    with torch.inference_mode():
        expected = trial.inner(**tokens).start_logits
        assert torch.equal(found(**tokens).start_logits, expected)
        assert torch.equal(trial.model(**tokens).start_logits, expected)
        assert not torch.equal(trial.inner(**tokens | {"token_type_ids": None}).start_logits, expected)
    path = folder / "0" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "QUESTION_ANS"}))  # as it was saved before
    with torch.inference_mode():
        assert torch.equal(lorasweep.load_best(folder)[0](**tokens).start_logits, expected)


def test_merged_model_needs_transformers_alone(classified, tmp_path):
    assert main.main(["export", str(classified), "--merged", "--to", str(tmp_path / "out")]) == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert "adapter_config.json" not in names
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found, tmp_path / "out"), adapted(classified), rtol=1e-4, atol=1e-5)
    assert set(found.config.label2id) == set(winner.load(classified / "0").task.classes)


def test_merged_language_model_equals_its_adapter(tiny_llama, tmp_path):
    folder = study(tmp_path, tiny_llama, "task_type=causal_lm", "lora.init_lora_weights=pissa")
    assert main.main(["export", str(folder), "--merged"]) == 0
    out = folder / "export-0-merged"
    found = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(found, out), adapted(folder), rtol=1e-4, atol=1e-5)


def test_bias_without_a_place_in_the_base_is_refused(tiny_llama, tmp_path, capsys):
    folder = study(tmp_path, tiny_llama, "task_type=causal_lm", "lora.lora_bias=true", "lora.target_modules=[q_proj]")
    assert main.main(["export", str(folder), "--merged"]) == 1
    error = capsys.readouterr().err
    assert "lora.lora_bias gave a bias" in error and "export without --merged" in error
    assert not (folder / "export-0-merged").exists()
    assert main.main(["export", str(folder)]) == 0


def test_card_tells_data_metrics_and_how_to_make_it_again(classified, tiny_bert, tmp_path):
    assert main.main(["export", str(classified), "--to", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft" and front["metrics"] == ["accuracy"] and "lora" in front["tags"]
    assert front["pipeline_tag"] == "text-classification" and "base_model" not in front
    result = json.loads((classified / "0" / "result.json").read_text())
    values = {m["name"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert values["eval accuracy"] == result["metric"]["value"]
    assert values["test accuracy"] == result["test"]["accuracy"]
    line = next(row for row in text.splitlines() if row.startswith("| eval | accuracy |"))
    low, high = line.split("|")[4].split(" to ")
    assert float(low) <= result["metric"]["value"] <= float(high)
    tested = next(row for row in text.splitlines() if row.startswith("| test | accuracy |"))
    low, high = tested.split("|")[4].split(" to ")
    assert float(low) <= result["test"]["accuracy"] <= float(high)
    found = answer.answer(Study.open(classified))
    assert export._plain(wording.of_trial(found, 0)) in text and wording.sentences(found)[0] in wording.of_trial(
        found, 0
    )
    assert result["rerun"].replace(" tracking=none", "") in text and "tracking" not in text
    assert result["data_fingerprint"] in text and "use_dora: true" in text
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == tiny_bert.name


def test_card_of_a_base_from_a_package_says_which(classified, monkeypatch):
    monkeypatch.setattr(
        export.base_model, "replaces_head", lambda *_: False
    )  # would ask the package, which is not there
    loaded = winner.load(classified / "0")
    spec = replace(loaded.spec, model=replace(loaded.spec.model, pretrained="package:gt_x"))
    assert "in the Python package gt_x\nbase = " in export._use(replace(loaded, spec=spec), merged=False)
    assert "package" not in export._use(loaded, merged=False)


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [("org/model", "org/model"), ("bert-base-uncased", "bert-base-uncased"), ("package:gt_x", None), ("/a/b", None)],
)
def test_base_is_named_where_the_hub_knows_it(pretrained, expected):
    from lorasweep.config.spec import ModelSpec

    assert export.hub_id(ModelSpec(pretrained=pretrained)) == expected


def test_text_of_data_and_settings_is_escaped():
    assert export._plain("<script>a|b</script>\n# c") == r"&lt;script&gt;a\|b&lt;/script&gt; \# c"


def test_nothing_is_written_over(classified, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main.main(["export", str(classified), "--to", str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_names_from_settings_stay_in_the_study(classified):
    assert main.main(["export", str(classified)]) == 0
    assert (classified / "export-0" / "README.md").is_file()
    assert Study.open(classified).trial_folder(0).parent == classified


def test_merged_model_of_a_quantised_base_is_ordinary_and_answers_as_the_adapter_did(tiny_bert, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")
    folder = study(tmp_path, tiny_bert, "model.pooling=model", "model.quantization=nf4")
    assert main.main(["export", str(folder), "--merged"]) == 0
    out = folder / "export-0-merged"
    found = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(found, out), adapted(folder), rtol=1e-4, atol=1e-5)


# --- proofs ----------------------------------------------------------------------------------------------------------

TIED = {
    "lora on both": ["lora.target_modules=[lm_head,embed_tokens]"],
    "a head in full": ["lora.target_modules=[q_proj]", "lora.modules_to_save=[lm_head]"],
    "word vectors in full": ["lora.target_modules=[q_proj]", "lora.modules_to_save=[embed_tokens]"],
    "neither": ["lora.target_modules=[q_proj]"],
}


@pytest.mark.parametrize("case", TIED)
def test_export_of_a_model_whose_head_is_its_word_vectors_answers_as_the_trial(tied_llama, tmp_path, case):
    folder = study(tmp_path, tied_llama, "task_type=causal_lm", *TIED[case])
    expected = adapted(folder)
    assert main.main(["export", str(folder), "--merged", "--to", str(tmp_path / "merged")]) == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(found, tmp_path / "merged"), expected, rtol=1e-3, atol=1e-4)
    assert found.config.tie_word_embeddings is (case == "neither")
    assert main.main(["export", str(folder), "--to", str(tmp_path / "adapter")]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tied_llama)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found, tmp_path / "adapter"), expected, rtol=1e-3, atol=1e-4)


def test_model_that_answers_otherwise_than_the_trial_is_not_exported(tied_llama, tmp_path, capsys, monkeypatch):
    folder = study(tmp_path, tied_llama, "task_type=causal_lm", "lora.target_modules=[q_proj,lm_head]")
    monkeypatch.setattr(export, "untie", lambda _: None)
    assert main.main(["export", str(folder), "--merged", "--to", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "answers otherwise than the trial" in error and "nothing was exported" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("task", ["question_ans", "feature_extraction"])
def test_every_task_is_proved_on_eval_rows(tiny_bert, tmp_path, capsys, task):
    folder = study(tmp_path, tiny_bert, f"task_type={task}")
    for more in ([], ["--merged"]):
        assert main.main(["export", str(folder), *more]) == 0
        assert "8 eval rows as the trial does" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nf4"])
def test_merged_gpt2_of_a_quantised_base_is_one_that_transformers_reads(tmp_path, kind):
    tokenizer = models.wordpiece()
    tokenizer.eos_token = "[SEP]"
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    more = ["lora.target_modules=[c_attn]", f"model.quantization={kind}", "data.max_tokens=48"]
    folder = study(tmp_path, tmp_path / "gpt2", "task_type=causal_lm", *more)
    assert main.main(["export", str(folder), "--merged", "--to", str(tmp_path / "out")]) == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found, tmp_path / "out"), adapted(folder), rtol=1e-3, atol=1e-3)
