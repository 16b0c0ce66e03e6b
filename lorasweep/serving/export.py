"""The winner as a folder ready for a hub: its adapter, or base and adapter as one, with tokenizer and model card.

Nothing is pushed. The card's front matter is YAML as the hub reads it; every value that comes from data or settings is
escaped.
"""

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from lorasweep import tasks
from lorasweep.config.fields import Affects
from lorasweep.config.spec import ModelSpec, TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter, peft_notices
from lorasweep.models import base_model
from lorasweep.serving import export_proof, winner
from lorasweep.serving.winner import Loaded
from lorasweep.study import answer, provenance, significance, wording
from lorasweep.study.result import TrialResult
from lorasweep.study.study import Study
from lorasweep.tasks.task import Task


def export(study: Study, number: int, folder: Path, *, merged: bool) -> export_proof.Proof:
    """Write a trial's adapter, or base and adapter as one, with tokenizer and card, into a new or empty folder; return
    how near what was written is to the trial.

    Raises ConfigError where the folder holds something, where the adapter cannot be merged, and, leaving nothing, where
    the written model does not answer as the trial does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"{folder}: is there already; remove it, or name another folder with --to"])
    trial = study.trial_folder(number)
    loaded = winner.load(trial, ordinary=merged, trusted=study.trusted)
    rows = export_proof.rows_of(loaded)
    answered = export_proof.answered(loaded.inner, loaded.task, loaded.tokenizer, rows)
    expected = [[loaded.task.in_units(t) for t in row] for row in answered]
    whole = merge(loaded.model) if merged else None
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if whole is not None:
            with torch.no_grad():
                loaded.task.finished(dict(whole.named_parameters()))
            whole.save_pretrained(part)
        else:
            shutil.copytree(trial / "adapter", part, dirs_exist_ok=True)
            _finish(part / "adapter_model.safetensors", loaded.task)
            _finish_config(part / "adapter_config.json", loaded.spec.model)
        loaded.tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card(study, number, loaded, merged=merged), encoding="utf8")
        proof = export_proof.prove(part, loaded, expected, rows, merged)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return proof


def _finish(path: Path, task: Task) -> None:
    """Let a saved adapter answer in the user's units; the same bytes where it does."""
    weights = load_file(path)
    before = {name: weight.clone() for name, weight in weights.items()}
    task.finished(weights)
    if any(not torch.equal(weight, before[name]) for name, weight in weights.items()):
        save_file(weights, path, metadata={"format": "pt"})


def merge(peft_model: Any) -> Any:
    """Return the base with the adapter's update in its weights. Raises ConfigError where that cannot be."""
    for layer in adapter.lora_layers(peft_model):
        if any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ConfigError(
                [
                    "--merged: lora.lora_bias gave a bias to layers whose base has none, so base and adapter "
                    "cannot become one; export without --merged"
                ]
            )
    untie(peft_model)
    try:
        with peft_notices.left_out():
            merged = peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError([f"--merged: peft cannot merge this adapter ({reason}); export without --merged"]) from error
    _say_untied(merged)
    return merged


def untie(peft_model: Any) -> None:
    """Copy the weight of each adapted layer that shares it with another module (a head that is the word vectors):
    the update is for it alone.
    """
    holders: dict[int, int] = {}
    for module in peft_model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                holders[id(weight)] = holders.get(id(weight), 0) + 1
    for layer in adapter.lora_layers(peft_model):
        base_layer = layer.get_base_layer()
        for name, weight in list(base_layer._parameters.items()):
            if weight is not None and holders[id(weight)] > 1:
                base_layer._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _say_untied(model: Any) -> None:
    """Let the config say that head and word vectors are two, where they are by now."""
    head = model.get_output_embeddings()
    if head is None or head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def hub_id(spec: ModelSpec) -> str | None:
    """Return the base's id on the hub, None for a folder or a model out of a package."""
    name = spec.pretrained
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and ":" not in name and not Path(name).is_dir()
    return name if known else None


def _finish_config(path: Path, spec: ModelSpec) -> None:
    """Let the adapter name its base as the settings do (peft has put this machine's folder there), and the task type
    that loads it right.
    """
    found = json.loads(path.read_text(encoding="utf8"))
    found["task_type"] = tasks.task_type_of_saved(found["task_type"])
    found["base_model_name_or_path"] = hub_id(spec) or base_model.name_of(spec)
    found["revision"] = spec.revision
    path.write_text(json.dumps(found, indent=2, sort_keys=True), encoding="utf8")


# --- the card --------------------------------------------------------------------------------------------------------


def card(study: Study, number: int, loaded: Loaded, *, merged: bool) -> str:
    """Return README.md: front matter, what it is, how to load it, its metrics, its settings, how to make it again."""
    result, spec = winner.result(study, number), loaded.spec
    title = f"{study.meta.name}, trial {number}"
    kind = "LoRA merged into its base" if merged else "LoRA adapter"
    parts = [
        f"---\n{yaml.safe_dump(_front(study, result, spec, merged), sort_keys=False, allow_unicode=True)}---\n",
        f"# {_plain(title)}\n",
        f"{kind} for {spec.task_type.name}, on {_plain(base_model.name_of(spec.model))}.\n",
        f"## Use\n\n```python\n{_use(loaded, merged)}```\n{_pooling(loaded)}",
        f"## Metrics\n\n{_metrics(study, number, result)}",
        f"## Data\n\n{_data(result, spec)}",
        f"## Settings\n\n```yaml\n{_settings(spec)}```\n",
        f"## Make it again\n\n```bash\n{_rerun(result)}\n```\n",
        f"Made with {', '.join(f'{k} {v}' for k, v in provenance.versions().items() if k in VERSIONS)}.\n",
    ]
    return "\n".join(parts)


def _rerun(result: TrialResult) -> str:
    """Return the rerun line without tracking.*: whose server it was logged to is nothing for a hub."""
    overrides = [o for o in result.overrides if not re.match(r"tracking[.=]", o)]
    return redact(shlex.join(["python", "-m", "lorasweep", *overrides]))


VERSIONS = ("lorasweep", "torch", "transformers", "peft")


def _front(study: Study, result: TrialResult, spec: TrialSpec, merged: bool) -> dict[str, Any]:
    """Return what the hub reads. Without a hub id the base is left out: the hub takes no other name."""
    out: dict[str, Any] = {"library_name": "transformers" if merged else "peft"}
    base = hub_id(spec.model)
    if base:
        out |= {"base_model": base, "base_model_relation": "merge" if merged else "adapter"}
    out |= {
        "pipeline_tag": tasks.kind(spec.task_type.name).pipeline,
        "tags": ["lora", "lorasweep", "base_model:" + (base or "")],
    }
    out["tags"] = [t for t in out["tags"] if not t.endswith(":")]
    out["metrics"] = [study.meta.metric]
    metrics = result.metrics or {}
    values = [{"type": k, "value": float(v), "name": f"eval {k}"} for k, v in metrics.items()]
    tested = {k: v for k, v in (result.test or {}).items() if k in metrics}
    values += [{"type": k, "value": float(v), "name": f"test {k}"} for k, v in tested.items()]
    task = {"type": tasks.kind(spec.task_type.name).pipeline}
    dataset = {"name": _data_name(spec), "type": _data_name(spec)}
    out["model-index"] = [{"name": study.meta.name, "results": [{"task": task, "dataset": dataset, "metrics": values}]}]
    return out


def _data_name(spec: TrialSpec) -> str:
    path = redact(spec.data.path or "builtin")
    return path if spec.data.source == "hub" else Path(path).name


def _plain(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _use(loaded: Loaded, merged: bool) -> str:
    """Return Python that loads the folder with plain transformers and peft."""
    spec, task = loaded.spec, loaded.task
    base = repr(hub_id(spec.model) or f"path/to/{base_model.name_of(spec.model)}")
    auto = "EncoderDecoderModel" if spec.model.decoder else task.auto_class
    replaced = not merged and base_model.replaces_head(spec.model, task)
    kwargs = task.model_kwargs() | ({"ignore_mismatched_sizes": True} if replaced else {})
    head = "".join(f", {k}={v!r}" for k, v in kwargs.items())
    lines = [f"from transformers import {auto}, AutoTokenizer"]
    if merged:
        lines += ["", f"model = {auto}.from_pretrained('.').eval()"]
    elif spec.model.decoder:
        lines = ["# base and decoder are joined by lorasweep", "import lorasweep", ""]
        return "\n".join([*lines, "model, tokenizer = lorasweep.load_best('outputs/STUDY')", ""])
    else:
        kind, _, name = spec.model.pretrained.partition(":")
        known = {"package": f"in the Python package {name}", "fetched": f"that `lorasweep fetch {name}` makes"}
        where = [f"# the base: the folder with config.json {known[kind]}"] if kind in known else []
        where += ["# the base is a finished classifier: its head is not used, the adapter brings its own"] * replaced
        lines += ["from peft import PeftModel", "", *where, f"base = {auto}.from_pretrained({base}{head})"]
        lines += ["model = PeftModel.from_pretrained(base, '.').eval()"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained('.')"]
    if not merged and task.one_answer:  # whose decoders look for the last token that is no padding
        lines += ["model.config.pad_token_id = tokenizer.pad_token_id"]
    if task.unexported:
        lines += ["", "# the head has no bias to hold this: it is to be added to what the model gives"]
        lines += [f"number = model(**tokenizer('a text', return_tensors='pt')).logits[0, 0] + {task.unexported!r}"]
    return "\n".join([*lines, ""])


VECTORS = {"mean": "the mean over the token vectors", "cls": "the first token's vector", "last": "the last token's"}


def _pooling(loaded: Loaded) -> str:
    """Return what other code has to do like the training did, where that is not the model's own way."""
    notes, spec = [], loaded.spec
    if loaded.task.pools:
        notes.append(f"A text's vector is {VECTORS[loaded.task.pooling]}, of length 1 (`model.pooling`).")
        prefixes = {"anchors": spec.data.anchor_prefix, "positives": spec.data.positive_prefix}
        notes += [f"Before {what} stands {text!r}." for what, text in prefixes.items() if text]
    if spec.model.pooling == "mean" and not tasks.kind(spec.task_type.name).pools:
        notes.append(
            "The head was trained on the mean over the token vectors (`model.pooling=mean`), not on the model's "
            "pooled first token: other code has to pool so too, e.g. `lorasweep.models.base_model.pool_by_mean(base)` "
            "before peft."
        )
    notes += [spec.lora.init.note] if spec.lora.init.note else []
    return "".join(f"\n{n}\n" for n in notes)


def _metrics(study: Study, number: int, result: TrialResult) -> str:
    """Return a table of all metrics, the one that ranked the trials with its intervals, and what the answer says."""
    lines = ["| split | metric | value | 95 % interval |", "|---|---|--:|---|"]
    metrics = result.metrics or {}
    for split, scores in (("eval", metrics), ("test", result.test or {})):
        parts = study.scores(number, split) if study.meta.metric in scores else None
        interval = f"{significance.interval(parts)}" if parts is not None else "-"
        for name, value in scores.items():
            shown = interval if name == study.meta.metric else "-"
            trivial = "" if name in metrics else " (trivial answer)"
            lines.append(f"| {split} | {_plain(name)}{trivial} | {value:.4f} | {shown} |")
    trivial_answers = (result.baseline or {}).items()
    lines += [f"| eval | {_plain(k)} (trivial answer) | {v:.4f} | - |" for k, v in trivial_answers]
    read = "Test was read once, after choosing. " if result.test else ""
    said = _plain(redact(wording.of_trial(answer.answer(study), number)))
    told = f"Intervals are over the examples of a split. {read}{said}"
    return "\n".join([*lines, "", f"{told.strip()}\n"])


def _data(result: TrialResult, spec: TrialSpec) -> str:
    fingerprint = result.data_fingerprint or "unknown"
    return f"{_plain(_data_name(spec))} ({spec.data.source}), fingerprint `{fingerprint}`\n"


def _settings(spec: TrialSpec) -> str:
    """Return the settings that the adapter is a result of, as YAML in a fence that no value can close."""
    text = redact(yaml.safe_dump(spec.affecting(Affects.RESULT), sort_keys=False, allow_unicode=True))
    return text.replace("```", "` ` `")
