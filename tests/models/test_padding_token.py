"""A decoder's classifier reads the last token that is no padding, whatever padding its own config names."""

import pytest
import torch
import transformers
from support.models import llama, wordpiece

from lorasweep.config.spec import DataSpec, ModelSpec, TaskSpec, TrainSpec
from lorasweep.models import base_model
from lorasweep.tasks import make

ROWS = [{"text": "a cat", "label": "a"}, {"text": "a very long sentence about many cats and dogs", "label": "b"}]


def gemma3(folder):
    """Save a Gemma 3, whose padding stands in the config of its text part."""
    tokenizer = wordpiece()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 5}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**text)
    transformers.Gemma3TextForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_row_is_scored_the_same_beside_a_longer_one(tmp_path, family):
    if family == "llama":
        llama(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"pad_token_id": 0', '"pad_token_id": 5'))
    else:
        gemma3(tmp_path)
    task, spec = make(TaskSpec(name="SEQ_CLS")), ModelSpec(pretrained=str(tmp_path))
    task.classes = ["a", "b"]
    tokenizer = base_model.load_tokenizer(spec)
    model = base_model.load(spec, TrainSpec(device="cpu", precision="fp32"), task, tokenizer).model
    assert model.config.get_text_config().pad_token_id == tokenizer.pad_token_id == 0
    examples = task.encode(ROWS, tokenizer, DataSpec())
    with torch.inference_mode():
        alone = model(**task.collate([examples[:1]], tokenizer.pad_token_id).inputs).logits[0]
        beside = model(**task.collate([examples], tokenizer.pad_token_id).inputs).logits[0]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
