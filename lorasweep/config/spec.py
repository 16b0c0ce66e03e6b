"""What a trial is: frozen dataclasses, each field with its meaning, unit and range, and every rule about their values.

A TrialSpec is computed once from override strings (compose.py); after that nobody sees a DictConfig.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from lorasweep.config import fields as field_rules
from lorasweep.config import registry
from lorasweep.config.fields import Affects, affects, one_of, ranged, setting
from lorasweep.config.measures import COSTS
from lorasweep.errors import did_you_mean

TARGET_PRESETS = ("all-linear", "attention", "mlp", "qv", "qkvo", "experts", "all")
"""Words for target_modules that stand for the right names in each model family."""

# What a key affects, strongest first: each of these holds what follows from it.

BASE = Affects.BASE | Affects.MEMORY | Affects.RESULT
"""Another frozen base is loaded."""
TOKENS = BASE | Affects.TOKENS
"""Examples are read and encoded again, too."""
MEMORY = Affects.MEMORY | Affects.RESULT
"""The trial computes something else, in tensors of other sizes."""
RESULT = Affects.RESULT
"""The trial computes something else; sizes stay."""
STUDY = Affects.STUDY
"""A study that has begun keeps its value."""
NOTHING = Affects(0)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    pretrained: str = setting("", affects=BASE)
    """Hub id, local folder, `package:NAME` (a Python package that carries the model) or `fetched:NAME` (by `fetch`)."""
    fetch: str = one_of("ask", "ask", "auto", "never", affects=NOTHING)
    """Whether a run fetches a `fetched:NAME` that is not on this machine: after a question on a terminal, by itself, or
    never."""
    revision: str | None = setting(None, affects=BASE)
    """Hub branch, tag or commit; null takes the default branch."""
    sha256: str | None = setting(None, affects=BASE)
    """Expected digest of model.safetensors; a mismatch refuses the model. null checks nothing."""
    decoder: str | None = setting(None, affects=BASE)
    """A second checkpoint that becomes the decoder of an EncoderDecoderModel; its cross-attention is new. Only for
    SEQ_2_SEQ_LM; written as `pretrained` is."""
    tokenizer: str | None = setting(None, affects=BASE)
    """Where the tokenizer comes from, if not from `pretrained`."""
    base_dropout: bool = setting(False, affects=BASE)
    """Keep the frozen base's dropout on while training (BERT's 0.1). Off: only the adapters' lora_dropout acts."""
    pooling: str = one_of("model", "model", "mean", "cls", "last", affects=BASE)
    """What a classification head reads: the model's own pooled token, or the mean over tokens, which is how most
    sentence-transformers models were trained. With mean, other code that loads the adapter has to pool so too. What
    FEATURE_EXTRACTION makes a vector of: the mean over tokens, the first or the last one; model takes what a
    sentence-transformers checkpoint says (1_Pooling/config.json), else the mean."""
    attn_implementation: str = one_of("auto", "auto", "sdpa", "eager", "flash_attention_2", affects=BASE)
    """Attention kernel, transformers' name; auto: flash_attention_2 on a GPU in bf16 or fp16 where it is installed,
    else sdpa where the model has it, else eager."""
    quantization: str = one_of("none", "none", "int8", "nf4", affects=BASE)
    """Keep the base's linear layers in 8 or 4 bits (bitsandbytes, extra `quant`): a half or a quarter of the memory.
    They are multiplied in train.precision; embeddings, output head and new heads stay as they are."""
    double_quant: bool = setting(True, affects=BASE)
    """nf4: quantise the blocks' scales too (QLoRA, arXiv:2305.14314), which saves 0.37 bits a weight."""
    device_map: str | None = one_of(None, "auto", "balanced", affects=BASE)
    """For a base too large for one GPU: accelerate spreads its layers over all of them, and one worker trains on all.
    null: one GPU a worker."""
    trust_remote_code: bool = setting(False, affects=BASE)
    """Run Python code that comes with the checkpoint. Only for sources you trust."""
    use_safetensors: bool = setting(True, affects=BASE)
    """Load safetensors only. Off: pickled weights (pytorch_model.bin) too. Only for sources you trust."""

    def problems(self) -> list[str]:
        if self.device_map is not None and self.decoder is not None:
            return [f"model.device_map: must be null for a model joined with model.decoder, got {self.device_map}"]
        return []


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    name: str = setting("", affects=TOKENS, options=registry.TASKS)
    """Which task: peft's TaskType, or the name of an outside package's."""
    primary: str | None = setting(None, affects=TOKENS)
    """Metric that ranks trials; null takes the task's own (accuracy, loss, ...)."""
    problem_type: str = one_of("auto", "auto", "single_label", "multi_label", "regression", affects=TOKENS)
    """What SEQ_CLS learns: one class a text, any number of classes (labels as a list, or as a string with `|` between
    them), or a number. auto: multi_label where the labels are lists, else single_label."""
    temperature: float = ranged(0.05, 0, 100, above=True, affects=TOKENS)
    """FEATURE_EXTRACTION on anchors and positives: cosines are divided by it before the softmax."""
    generate: bool = setting(False, affects=TOKENS)
    """Evaluate generated text too: exact_match of CAUSAL_LM, rouge_l, bleu and chrf of SEQ_2_SEQ_LM. Greedy."""
    max_new_tokens: int = ranged(64, 1, 1_000_000, affects=TOKENS)
    """Longest text to generate, in tokens."""
    answer_pattern: str | None = setting(None, affects=TOKENS)
    """Regular expression that finds the answer: its last match, or that match's first group. exact_match compares the
    answers of the generated and the expected text, as text or as numbers (1,200 equals 1200). null compares what
    follows `#### `, or the whole text."""
    generate_samples: int | None = ranged(64, 1, affects=TOKENS)
    """Inputs of each split to answer by generation, spread evenly over it; null answers all."""
    metrics: list[str] | None = setting(None, affects=BASE)
    """Further metrics, any of which may be `primary`. Of classes: auroc, auprc, balanced_accuracy, calibration_error,
    cost, f2 (any f and number: macro F-beta); of generated text: rouge_1, rouge_2, rouge_l, bleu, chrf, pattern_match;
    a function of your own as MODULE:FUNCTION, which takes rows, predictions and references and returns a number a row,
    or one for all (docs/tasks.md)."""
    costs: dict[str, dict[str, float]] | None = setting(None, affects=BASE)
    """What mistakes cost, for the metric `cost`, its mean a row: true class to predicted class to a number, such as
    {spam:{ham:1},ham:{spam:10}}; what is not named costs 0."""
    match_pattern: str | None = setting(None, affects=BASE)
    """Regular expression of the metric `pattern_match`: the share of generated texts in which it is found."""
    class_weights: str | dict[str, float] | None = setting(None, affects=BASE)
    """SEQ_CLS with one class a text: what a row's training loss is multiplied by, as a class to its weight (1 where
    none is named), or balanced: rows over classes over the class's rows. The metric `loss` stays unweighted."""

    def problems(self) -> list[str]:
        """Return what is wrong with patterns, metrics and weights by themselves."""
        patterns = {"answer_pattern": self.answer_pattern, "match_pattern": self.match_pattern}
        return [
            *(problem for key, pattern in patterns.items() for problem in _pattern_problems(key, pattern)),
            *self._metric_problems(),
            *self._weight_problems(),
        ]

    def _metric_problems(self) -> list[str]:
        names, out = self.metrics or [], []
        wrong = [n for n in names if not re.fullmatch(r"[A-Za-z_]\w*(\.\d+)?|[A-Za-z_][\w.]*:[A-Za-z_]\w*", n)]
        if wrong:
            out.append(f"task_type.metrics: each must be a metric's name or MODULE:FUNCTION, got '{wrong[0]}'")
        needs = {"cost": ("costs", "{spam:{ham:1},ham:{spam:10}}"), "pattern_match": ("match_pattern", "'^yes'")}
        for name, (key, example) in needs.items():
            if name in names and getattr(self, key) is None:
                out.append(f"task_type.{key}: must be given with task_type.metrics=[{name}], e.g. {example}")
            if name not in names and getattr(self, key) is not None:
                out.append(f"task_type.{key}: is for the metric {name}; give task_type.metrics=[{name}] too")
        prices = [price for row in (self.costs or {}).values() for price in row.values()]
        bad = [price for price in prices if not 0 <= price < math.inf]
        return [*out, *(f"task_type.costs: each must be a finite number from 0, got {price:g}" for price in bad[:1])]

    def _weight_problems(self) -> list[str]:
        weights = self.class_weights
        if isinstance(weights, str) and weights != "balanced":
            return [f"task_type.class_weights: must be balanced or a mapping of classes to numbers, got '{weights}'"]
        values = weights.values() if isinstance(weights, dict) else []
        bad = [w for w in values if not 0 < w < math.inf]
        return [f"task_type.class_weights: each must be a finite number above 0, got {w:g}" for w in bad[:1]]


def _pattern_problems(key: str, pattern: str | None) -> list[str]:
    try:
        re.compile(pattern or "")
    except re.error as error:
        return [f"task_type.{key}: '{pattern}' is no regular expression ({error})"]
    return []


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """peft's LoraConfig, key by key; source: peft.LoraConfig and arXiv:2106.09685."""

    r: int = ranged(8, 1, 1024, affects=MEMORY)
    """Rank of the update BA, 1 to 1024."""
    lora_alpha: float | None = ranged(None, 0, above=True, affects=RESULT)
    """The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora; null is 16."""
    alpha_ratio: float | None = ranged(None, 0, above=True, affects=RESULT)
    """lora_alpha as a multiple of r, in its place: alpha_ratio=2 keeps the scale at 2 whatever r is, in modules
    of rank_pattern too."""
    lora_dropout: float = ranged(0.0, 0, 0.95, affects=MEMORY)
    """Probability that an input of A is set to zero while training, 0 to 0.95."""
    target_modules: str | list[str] = setting("all-linear", affects=MEMORY)
    """Modules to adapt: names (suffixes) as a list, one regular expression, or a word that knows each model family's
    names. attention: what mixes tokens, in a hybrid's other layers what stands in its place; qv, qkvo: attention's
    queries, values, keys, output; mlp: feed-forward networks and experts; experts: those alone; all: attention and mlp;
    all-linear: every linear layer but heads. An empty list adapts none: a new head trains alone (a linear probe)."""
    exclude_modules: str | list[str] | None = setting(None, affects=MEMORY)
    """Modules to leave out again: names (suffixes) as a list, or one regular expression."""
    target_parameters: list[str] | None = setting(None, affects=MEMORY)
    """Parameters to adapt by name (suffixes): MoE experts that a model keeps in one 3-D tensor, such as
    mlp.experts.gate_up_proj and mlp.experts.down_proj. r is the rank for each expert."""
    bias: str = one_of("none", "none", "all", "lora_only", affects=MEMORY)
    """Which biases of the base train: none, all, or those of the adapted modules. Not lora_bias."""
    lora_bias: bool = setting(False, affects=MEMORY)
    """Add a bias to B, scaled and merged with the update. It does not touch the base's biases; `bias` does."""
    use_rslora: bool = setting(False, affects=RESULT)
    """Scale by lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    use_dora: bool = setting(False, affects=MEMORY)
    """Learn magnitude and direction apart (arXiv:2402.09353): slower, for small ranks."""
    init_lora_weights: bool | str = setting(True, affects=MEMORY, options=registry.INITS)
    """How A and B are initialised, by peft's names. true: random A, B = 0; false: random B too; N: an integer from
    1."""
    loftq_bits: int = one_of(4, 4, 8, affects=MEMORY)
    """init_lora_weights=loftq: bits of the quantised base, 4 (NF4) or 8."""
    loftq_iter: int = ranged(1, 1, 20, affects=MEMORY)
    """init_lora_weights=loftq: rounds of quantising and decomposing (arXiv:2310.08659)."""
    eva_rho: float = ranged(2.0, 1, 16, affects=MEMORY)
    """init_lora_weights=eva: highest rank of a module, as a multiple of r; 1 keeps all at r (arXiv:2410.07170)."""
    modules_to_save: list[str] | None = setting(None, affects=MEMORY)
    """Modules trained in full and saved with the adapter; a new head is added by itself."""
    full: bool = setting(False, affects=MEMORY)
    """Train every weight of the base, in fp32, and no adapter: what LoRA is compared with (search.baselines=[full]).
    Such a trial trains alone, and its weights are not saved."""
    layers_to_transform: list[int] | int | None = setting(None, affects=MEMORY)
    """Indices of the layers to adapt; null adapts all. An index is the first number in a module's name, as peft has it:
    in T5 a block of the encoder and one of the decoder. `check` shows which modules it takes."""
    layers_pattern: str | list[str] | None = setting(None, affects=MEMORY)
    """Name of the module list that layers_to_transform indexes, or a regular expression; null takes the outermost."""
    rank_pattern: dict[str, int] | None = setting(None, affects=MEMORY)
    """Ranks of modules that differ from r, by name (suffix) or regular expression."""
    alpha_pattern: dict[str, float] | None = setting(None, affects=MEMORY)
    """lora_alpha of modules that differ, likewise."""
    loraplus_lr_ratio: float = ranged(1.0, 1, 256, affects=RESULT)
    """LoRA+ (arXiv:2402.12354): learning rate of B divided by that of A. 1 is off; its authors advise 16."""

    @property
    def alpha(self) -> float:
        """lora_alpha as a number, however it was given."""
        if self.alpha_ratio is not None:
            return self.alpha_ratio * self.r
        return 16.0 if self.lora_alpha is None else self.lora_alpha

    @property
    def eva_directions(self) -> int:
        """Directions that eva looks for in a module's inputs."""
        return math.ceil(max([self.r, *(self.rank_pattern or {}).values()]) * self.eva_rho)

    @property
    def init(self) -> Any:
        """The entry of lora/inits.py that init_lora_weights names."""
        return registry.INITS.get(self.init_lora_weights)

    @property
    def changes_base(self) -> bool:
        """Whether the adapter's start is taken out of the base weights, as PiSSA and OLoRA do."""
        return self.init.changes_base

    @property
    def rounds_base(self) -> bool:
        """Whether the initialisation quantises the base weights that it adapts, as LoftQ does."""
        return self.init.rounds_base

    def problems(self) -> list[str]:
        """Return the rules that tie several keys together, as far as they are broken."""
        init = self.init
        out: list[str] = init.problems(self)
        if self.lora_alpha is not None and self.alpha_ratio is not None:
            out.append("lora.alpha_ratio: stands in the place of lora.lora_alpha; give one of them")
        if self.full:
            out += self._full_problems()
        if self.use_dora and not init.dora:
            out.append(
                f"lora.use_dora: peft does not initialise DoRA with {init.name}; choose another init_lora_weights"
            )
        if self.lora_bias and not init.lora_bias:
            able = [name for name in registry.INITS if registry.INITS.named(name).lora_bias]
            out.append(f"lora.lora_bias: needs init_lora_weights={' or '.join(able)}, got {self.init_lora_weights}")
        if self.lora_bias and self.use_dora:
            out.append("lora.lora_bias: peft has no bias of B with lora.use_dora; leave one of them out")
        low = [r for r in (self.rank_pattern or {}).values() if not 1 <= r <= 1024]
        if low:
            out.append(f"lora.rank_pattern: ranks must be between 1 and 1024, got {low[0]}")
        return out + self._layer_problems() + self.parameter_problems()

    def _full_problems(self) -> list[str]:
        """Return what says something of an adapter where there is none."""
        asked = {
            "target_modules": bool(self.target_modules),
            "target_parameters": bool(self.target_parameters),
            "modules_to_save": bool(self.modules_to_save),
            "use_dora": self.use_dora,
            "init_lora_weights": self.changes_base or self.rounds_base,
        }
        wrong = [key for key, is_asked in asked.items() if is_asked]
        return [
            f"lora.full: every weight trains and there is no adapter, got lora.{key}={getattr(self, key)}; give "
            "lora.target_modules=[] and nothing else of lora, or leave lora.full out"
            for key in wrong[:1]
        ]

    def _layer_problems(self) -> list[str]:
        out = []
        if self.layers_pattern and self.layers_to_transform is None:
            out.append("lora.layers_pattern: needs lora.layers_to_transform")
        regex = isinstance(self.target_modules, str) and self.target_modules not in TARGET_PRESETS
        if self.layers_to_transform is not None and regex:
            out.append(
                "lora.layers_to_transform: needs lora.target_modules as a list or a preset (peft ignores layers for a "
                f"regular expression), got '{self.target_modules}'"
            )
        return out

    def parameter_problems(self) -> list[str]:
        """Return what peft cannot do on 3-D expert parameters."""
        if not self.target_parameters:
            return []
        refused = {
            "lora_dropout": self.lora_dropout > 0,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            f"init_lora_weights={self.init_lora_weights}": not self.init.experts,
        }
        return [
            f"lora.target_parameters: expert parameters cannot be combined with {name}; leave one of them out"
            for name, asked in refused.items()
            if asked
        ]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    source: str = setting("builtin", affects=TOKENS, options=registry.READERS)
    """Where rows come from; `builtin` is the text of this Python's own standard library. `data.path` alone is `auto`:
    the kind of file is found by its content. csv is tsv too, jsonl is json too."""
    path: str | None = setting(None, affects=TOKENS)
    """File (compressed or not), folder with a file or numbered files a split, pattern with `*`, or hub data set id."""
    config: str | None = setting(None, affects=TOKENS)
    """Configuration name of a hub data set."""
    revision: str | None = setting(None, affects=TOKENS)
    """Branch, tag or commit of a hub data set; null takes the default branch."""
    encoding: str | None = setting(None, affects=TOKENS)
    """Encoding of a text file, by Python's name (utf-8, cp1252, gb18030, utf-16); null finds it and says so."""
    bad_rows: str = one_of("auto", "auto", "skip", "error", affects=TOKENS)
    """What to do with rows that cannot be read or lack a field. skip leaves them out and counts them; error refuses the
    file; auto skips up to 1 % of a split, and at least one row, and refuses more."""
    train_split: str = setting("train", affects=TOKENS)
    """Name of the training split: a hub split, a file name, or a word that occurs in one file name of the folder."""
    eval_split: str | None = setting(None, affects=TOKENS)
    """Split that pruning and ranking use. null takes the folder's (validation, valid, eval, dev, val), or carves one
    from train by a hash of the text, class by class."""
    test_split: str | None = setting(None, affects=TOKENS)
    """Split that is scored once, for the winner. null takes the folder's (test), or carves one the same way."""
    eval_fraction: float = ranged(0.1, 0, 0.5, above=True, affects=TOKENS)
    """Share of train that a carved eval split takes."""
    test_fraction: float = ranged(0.1, 0, 0.5, above=True, affects=TOKENS)
    """Share of train that a carved test split takes."""
    max_train_samples: int | None = ranged(None, 1, affects=TOKENS)
    """Largest number of training rows, chosen by hash, so that a smaller set is a subset of a larger one."""
    max_eval_samples: int | None = ranged(None, 1, affects=TOKENS)
    """Largest number of rows in the eval split, and in the test split."""
    max_tokens: int | None = ranged(None, 4, 1_000_000, affects=TOKENS)
    """Longest example, in tokens; longer ones are cut. null takes the 99th percentile of train's lengths, at most
    what the model reads, and says so."""
    too_long: str = one_of("auto", "auto", "drop", "truncate", "error", affects=TOKENS)
    """What to do with rows that are longer than max_tokens: they are cut and counted, and error refuses the file.
    CAUSAL_LM, a training row whose prompt leaves no room for its answer: drop leaves it out, truncate cuts the prompt
    on the left and keeps the answer, auto drops up to 5 % and refuses more. Rows of eval and test are always truncated,
    so that they are the same for every max_tokens."""
    text_column: str = setting("text", affects=TOKENS)
    """Column of the text."""
    text_pair_column: str | None = setting(None, affects=TOKENS)
    """Column of a second text, read together with the first; null for none."""
    label_column: str = setting("label", affects=TOKENS)
    """Column of SEQ_CLS's labels."""
    label_columns: list[str] | None = setting(None, affects=TOKENS)
    """SEQ_CLS with several classes per text: one column of 0 and 1 per class, instead of label_column."""
    prompt_column: str | None = setting(None, affects=TOKENS)
    """Column of a CAUSAL_LM's prompts, which the model reads but does not learn; null learns all of text_column."""
    completion_column: str | None = setting(None, affects=TOKENS)
    """Column of the answers, which the model learns to write after each prompt."""
    prompt_suffix: str = setting("\n", affects=TOKENS)
    """Text between prompt and completion."""
    input_column: str | None = setting(None, affects=TOKENS)
    """Column of text to add to the prompt on a new line, where there is any, such as Alpaca's `input`."""
    messages_column: str | None = setting(None, affects=TOKENS)
    """Column of chats, lists of {role, content} or {from, value}, rendered by the tokenizer's chat template; the model
    learns the assistant's turns."""
    chat_template: str | None = setting(None, affects=TOKENS)
    """Jinja template that renders chats: `chatml`, a file, or its text; null takes the tokenizer's. It is saved with
    the exported model's tokenizer."""
    tools_column: str | None = setting(None, affects=TOKENS)
    """Column of the lists of tools for the chat template; null takes a column `tools` where there is one."""
    source_column: str = setting("source", affects=TOKENS)
    """Column of the text that a SEQ_2_SEQ_LM reads."""
    target_column: str = setting("target", affects=TOKENS)
    """Column of the text that a SEQ_2_SEQ_LM learns to write."""
    source_prefix: str = setting("", affects=TOKENS)
    """Text before each source, such as `summarize: `."""
    max_target_tokens: int = ranged(64, 2, 1_000_000, affects=TOKENS)
    """Longest target, in tokens; longer ones are cut."""
    score_column: str | None = setting(None, affects=TOKENS)
    """FEATURE_EXTRACTION: column of the similarity of text_column and text_pair_column; null takes anchors and
    positives."""
    anchor_column: str = setting("anchor", affects=TOKENS)
    """FEATURE_EXTRACTION without scores: column of the text to search with, such as a question."""
    positive_column: str = setting("positive", affects=TOKENS)
    """Column of the text that the anchor is to find."""
    negative_column: str | None = setting(None, affects=TOKENS)
    """Column of a text that the anchor is not to find; null for none."""
    anchor_prefix: str | None = setting(None, affects=TOKENS)
    """Text before each anchor, and before both texts of pairs with a score. null takes the prompt of a
    sentence-transformers checkpoint (config_sentence_transformers.json): query; for scored pairs STS, else the default
    one."""
    positive_prefix: str | None = setting(None, affects=TOKENS)
    """Text before each positive and negative; null takes the checkpoint's prompt for documents."""
    delimiter: str | None = setting(None, affects=TOKENS, earlier=",")
    """Character between the cells of a CSV file; `tab` for tabulators; null finds it."""
    quoting: bool = setting(True, affects=TOKENS)
    """Take off the quotation marks around a CSV cell. Off: they are characters like any other."""
    header: list[str] | None = setting(None, affects=TOKENS)
    """Column names of a CSV file that has no header line; further cells are left out."""
    tokens_column: str = setting("tokens", affects=TOKENS)
    """Column of a row's words: a list, or a string split at white space."""
    tags_column: str = setting("tags", affects=TOKENS)
    """Column of the tags, one per word. Tags of a scheme (IOB1, IOB2, IOBES, BILOU, ...) are scored by whole
    entities."""
    question_column: str = setting("question", affects=TOKENS)
    """Column of QUESTION_ANS's questions."""
    context_column: str = setting("context", affects=TOKENS)
    """Column of the text in which QUESTION_ANS finds the answer."""
    answers_column: str = setting("answers", affects=TOKENS)
    """Column of the answers: SQuAD's {"text": [...], "answer_start": [...]}, or a list of {"text", "start"}; empty
    where the text has no answer."""
    group_column: str | None = setting(None, affects=TOKENS)
    """Column that says which rows belong together (an article, a customer): they stay in one split when eval or test is
    carved, and intervals and comparisons resample them together. null: for QUESTION_ANS, the context."""
    doc_stride: int = ranged(64, 0, affects=TOKENS)
    """Tokens of context that each window of max_tokens shares with the one before; at most three quarters."""

    def problems(self) -> list[str]:
        out = []
        if self.source != "builtin" and not self.path:
            out.append(f"data.path: must be given for data={self.source}, e.g. data.path=folder/or/file")
        if (self.prompt_column is None) != (self.completion_column is None):
            out.append("data.prompt_column and data.completion_column: give both or neither")
        if self.score_column and not self.text_pair_column:
            out.append("data.text_pair_column: must be given with data.score_column, e.g. data.text_pair_column=text_b")
        if self.delimiter not in (None, "tab", "\\t") and len(self.delimiter) != 1:
            out.append(f"data.delimiter: must be one character or tab, got '{self.delimiter}'")
        return out


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    learning_rate: float | str = ranged(1e-3, 0, 1, above=True, word="auto", affects=RESULT)
    """Peak learning rate of AdamW; auto reckons it from the task, the model's hidden size, batch_size, the adapter's
    scale and its start (docs/lora.md), and says what it came to."""
    lr_multiple: float = ranged(1.0, 0, 1000, above=True, affects=RESULT)
    """What learning_rate=auto is multiplied by; search it from 0.25 to 4."""
    weight_decay: float = ranged(0.0, 0, 10, affects=RESULT)
    """Decoupled weight decay of AdamW, on matrices only (no biases, no norms)."""
    adam_beta1: float = ranged(0.9, 0, 0.9999, affects=RESULT)
    """AdamW's decay rate of the gradient's running mean, per step."""
    adam_beta2: float = ranged(0.999, 0, 0.99999, affects=RESULT)
    """AdamW's decay rate of the squared gradient's running mean, per step."""
    adam_epsilon: float = ranged(1e-8, 0, 1, above=True, affects=RESULT)
    """Added to AdamW's denominator."""
    lr_scheduler_type: str = one_of("linear", "linear", "cosine", "constant", affects=RESULT)
    """Learning rate after warm-up: linear decay to zero, half a cosine to zero, or constant."""
    warmup_ratio: float = ranged(0.06, 0, 1, affects=RESULT)
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: float = ranged(1.0, 0, affects=RESULT)
    """Gradients are scaled down to this norm; 0 never clips."""
    epochs: float = ranged(3, 0, 10_000, above=True, affects=MEMORY)
    """Passes over the training split; max_steps wins if both are set."""
    max_steps: int | None = ranged(None, 0, affects=MEMORY)
    """Optimiser steps in all; 0 trains nothing, and the model is scored as it begins."""
    batch_size: int = ranged(16, 1, 65_536, affects=MEMORY)
    """Examples per optimiser step."""
    micro_batch_size: int | str | None = ranged(None, 1, word="auto", affects=MEMORY)
    """Examples per forward pass; null takes batch_size. auto starts with batch_size and halves it when memory runs out:
    the step is repeated in more passes, with the same loss, and later trials start with what fits. With anchors and
    positives the loss depends on the rows of a pass: there auto halves nothing, and a smaller number changes the
    loss."""
    gradient_checkpointing: bool = setting(False, affects=MEMORY)
    """Keep only each layer's input, and compute the layer again in the backward pass: about a third more time, much
    less memory, the same results. It holds for all trials that share a pass with this one."""
    slots: int | str = ranged("auto", 1, 64, word="auto", affects=NOTHING)
    """Trials that a worker trains at once, in one forward and backward pass. auto measures what pays on this machine,
    or takes 4 where a sampler learns from results, so that its draws do not depend on the machine's speed. It changes
    speed and memory, not results."""
    prefix_cache_gib: float = ranged(1.0, 0, affects=Affects.MEMORY)
    """Memory per worker, GiB, for the outputs of layers that no active trial changes, one per example; what does not
    fit goes to files in the study's folder. 0 turns it off. It changes speed and memory, not results."""
    eval_batch_size: int = ranged(32, 1, affects=MEMORY)
    """Examples per forward pass of an evaluation."""
    eval_every: int | None = ranged(None, 1, affects=MEMORY)
    """Optimiser steps between evaluations; null evaluates after each epoch."""
    keep: str = one_of("best", "best", "last", affects=MEMORY)
    """Which evaluation a trial's score and its adapter are of: the best by the metric that ranks trials, of equals the
    first, or the last. Evaluations that a pruner alone asks for do not count."""
    patience: int | None = ranged(None, 1, affects=RESULT)
    """A trial ends, complete, once so many evaluations in a row were no better than the best before them; null never
    ends one for it."""
    max_loss_ratio: float | str | None = setting(
        "auto", affects=RESULT, range=(1, math.inf, True), word="auto", earlier=10.0
    )
    """A trial whose loss stays above this multiple of its first loss is pruned; null never prunes for it. auto: 3 for
    tasks that write text, whose loss cannot rise tenfold (uniform over 49,000 words it is 10.8 nats), else 10."""
    optimizer: str = one_of("adamw", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", affects=MEMORY)
    """AdamW with fp32 moments, or one of bitsandbytes' (extra `quant`): moments in 8 bits, in memory that a GPU may
    page out, or both."""
    seed: int = ranged(0, 0, 2**32 - 1, affects=RESULT)
    """Seeds the adapter, the head, the order of examples and dropout."""
    device: str = one_of("auto", "auto", "cpu", "cuda", "mps", affects=BASE)
    """Where trials train; auto takes a GPU where there is one."""
    precision: str = one_of("auto", "auto", "fp32", "bf16", "fp16", affects=BASE)
    """Number format of the base model; auto takes bf16 on a GPU that has it, fp32 on a CPU. Trained weights and their
    moments stay in fp32 and are rounded to this format for products. On a GPU fp32 means TF32; fp16 scales each trial's
    loss."""
    deterministic: bool = setting(False, affects=BASE)
    """The same losses bit for bit with the same seed, device and versions, at some cost on a GPU. slots=auto then takes
    1, and no measured time decides which trials share a pass."""

    @property
    def rows(self) -> int:
        """Examples a forward pass takes."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else self.batch_size

    @property
    def fixed_slots(self) -> int | None:
        """The number of slots, or None to measure it."""
        return self.slots if isinstance(self.slots, int) else None

    def problems(self) -> list[str]:
        out, micro = [], self.micro_batch_size
        if self.lr_multiple != 1 and self.learning_rate != "auto":
            out.append(
                f"train.lr_multiple: multiplies train.learning_rate=auto alone, got {self.lr_multiple:g} beside a "
                f"learning_rate of {self.learning_rate:g}; set train.learning_rate=auto, or leave lr_multiple out"
            )
        if isinstance(micro, int) and micro > self.batch_size:
            out += [
                f"train.micro_batch_size: must be at most train.batch_size, got {micro} of {self.batch_size}; "
                "it is the part of a step's batch that one forward pass takes"
            ]
        return out


@dataclass(frozen=True, kw_only=True)
class TrackSpec:
    uri: str | None = setting(None, affects=NOTHING)
    """MLflow tracking URI; null is SQLite at <outputs>/mlflow.db."""
    experiment: str = setting("lorasweep", affects=NOTHING)
    """MLflow experiment that holds the studies."""
    enabled: bool = setting(True, affects=NOTHING)
    """Off: only the trial folders are written."""
    reload_check: bool = setting(True, affects=Affects.MEMORY)
    """Load the saved adapter with peft onto a fresh base, evaluate again and compare."""
    log_every: int = ranged(1, 1, affects=NOTHING)
    """Optimiser steps between logged training points."""
    system_metrics: bool = setting(True, affects=NOTHING)
    """Log CPU, memory and GPU every 10 seconds, under MLflow's names (system/...)."""
    save_adapters: str = one_of("all", "all", "best", "pareto", "top_k", "none", affects=NOTHING)
    """Which adapters to keep when a study has ended: all, the best, those on the report's Pareto front, or the keep_top
    best. Unless it is all, MLflow gets only the best, as a model."""
    keep_top: int = ranged(3, 1, affects=NOTHING)
    """How many adapters save_adapters=top_k keeps."""
    log_model: bool = setting(True, affects=NOTHING)
    """Log the best adapter as an MLflow model when a study has ended; it names the base and does not copy it."""
    register: str | None = setting(None, affects=NOTHING)
    """Name in MLflow's model registry under which the best adapter is registered; its alias is champion where the
    test split shows it to be better than the champion so far by more than search.margin, else challenger."""

    def problems(self) -> list[str]:
        out = []
        if self.register is not None and not _is_label(self.register, r"/\:"):
            out += [f"tracking.register: must be a name without '/' and ':', at most 200 long, got {self.register!r}"]
        if not _is_label(self.experiment, ""):
            out += [f"tracking.experiment: must be a name of one line, at most 200 long, got {self.experiment!r}"]
        return out


def _is_label(name: str, without: str) -> bool:
    """Return whether a name can be one of MLflow's: printable, not blank, not too long, no step of a path."""
    return (
        name.isprintable() and 0 < len(name.strip()) <= 200 and not set(name) & set(without) and name.strip(". ") != ""
    )


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How a study searches. These keys belong to the study, not to a trial: its rerun line leaves them out."""

    question: str | list[str] = setting("", affects=STUDY)
    """What the study should tell, in a sentence; by default the sweep file's first comment line. Or the keys that it
    asks about, [lora.r, lora.target_modules]: then of each of their choices, and of each third of a range, one trial at
    least runs to its end, whatever the pruner."""
    sampler: str = setting("auto", affects=STUDY, options=registry.SAMPLERS)
    """How points are drawn. grid takes each point once; the others are Optuna's samplers. auto is grid where the trials
    suffice for every point, and else chosen by their number and the space; the first line says what and why."""
    trials: int | None = ranged(None, 1, affects=NOTHING)
    """Number of trials; null takes every point of a grid, and 20 with any other sampler."""
    seed: int = ranged(0, 0, 2**32 - 1, affects=NOTHING)
    """Seeds the sampler: the same points are drawn on a fast machine and on a slow one, at any train.slots, as long as
    the metrics are the same."""
    startup_trials: int | str = ranged("auto", 1, affects=NOTHING, word="auto")
    """Trials spread over the space before tpe and gp start to model the results. auto is a third of the trials, 10 at
    most, and one for each worker and recipe at least."""
    in_flight: int | str = ranged("auto", 1, affects=NOTHING, word="auto")
    """Most trials under way at once where a sampler learns, once startup_trials have begun: a point waits for the
    results of all trials before it but the last in_flight - 1, and for half of them at least. auto is 8, or 4 for each
    worker."""
    objectives: list[str] | None = setting(None, affects=STUDY, each=tuple(COSTS))
    """Costs to minimise besides the primary metric. Pruning and the best trial go by the primary metric alone."""
    direction: str = one_of("auto", "auto", "maximize", "minimize", affects=STUDY)
    """Whether a larger primary metric is better; auto knows it for the tasks' metrics."""
    pruner: str = setting("auto", affects=NOTHING, options=registry.PRUNERS)
    """Which trials end early, judged by the primary metric at evaluations. asha is asynchronous successive halving
    (arXiv:1810.05934). Where a sampler learns, a trial is judged by the results that its draw has seen. auto is none
    for a grid and for few trials."""
    min_complete: int = ranged(5, 0, affects=NOTHING)
    """Fewest trials that run to their end, whatever the pruner: a trial is not pruned while it is among the best
    min_complete at its step. Trials that fail, or that you stop, do not count."""
    min_steps: int | None = ranged(None, 1, affects=NOTHING)
    """Optimiser steps before a trial may be pruned, and the first rung of asha and hyperband; null: an eighth of the
    trial's steps, at least twice its warm-up; none for threshold. In its last tenth no trial is pruned for being worse
    than others."""
    reduction_factor: int = ranged(4, 2, 64, affects=NOTHING)
    """asha, hyperband: about one trial in reduction_factor goes on at each rung."""
    pruner_startup_trials: int = ranged(5, 1, affects=NOTHING)
    """median, wilcoxon: trials that must finish before the first is pruned."""
    lower: float | None = setting(None, affects=NOTHING)
    """threshold: a trial whose metric is below this is pruned."""
    upper: float | None = setting(None, affects=NOTHING)
    """threshold: a trial whose metric is above this is pruned."""
    device_hours: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """Budget in device hours, summed over all trials: once it is spent, no trial starts."""
    wall_hours: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """Budget in hours since the study began: once it is spent, no trial starts."""
    cost_per_hour: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """What an hour of one worker costs, its GPU or its machine, in any currency: forecasts, the report and max_cost go
    by it."""
    max_cost: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """Budget in the currency of cost_per_hour: once the workers' hours have cost it, no trial starts."""
    max_memory_gib: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """A trial that needs more memory by itself, as `check` estimates it, is pruned before its model is loaded. With
    train.micro_batch_size=auto the estimate is for one row per pass."""
    target: float | None = setting(None, affects=NOTHING)
    """Once a trial's primary metric is this good, no further trial starts."""
    stop: str = one_of("budget", "budget", "when_settled", affects=NOTHING)
    """when_settled: no trial of the search starts once the remaining ones are expected to improve on the best by less
    than the margin, judged by the finished ones, of which it needs 8, and none brings a value that no finished one
    had. Repeats run then."""
    margin: float | None = ranged(None, 0, above=True, affects=NOTHING)
    """How much worse than the best a cheaper configuration may be; null takes 0.01, or 1 % of a loss."""
    repeats: int | str = ranged(0, 0, 1000, word="auto", affects=NOTHING)
    """Runs with new seeds once the search is over, for each of the first `repeat_top`: all of them once, then those
    that may change the choice. It ends earlier where more runs, however many, are expected to gain less than a
    thirtieth of the margin. auto: until, as far as seeds tell, none of the others can be better than the best by more
    than the margin (95 %), or device_hours or wall_hours is spent; without those, after as many as the search had
    trials, but three for each at least."""
    repeat_top: int = ranged(3, 1, affects=NOTHING)
    """How many of the best trials run again first; so does the cheapest within the margin."""
    baselines: list[str] | None = setting(None, affects=STUDY, each=("base", "head", "full"))
    """Trials to compare the best one with, which the sampler does not see; they run after the search's first ones are
    queued and have the next numbers. base: the model as it is, no training; head: a new head alone, on the frozen base
    (a linear probe), at ten times the learning rate; full: every weight of the base, at a tenth of it."""
    enqueue: list[str] | None = setting(None, affects=STUDY)
    """Recipes tried first, each a string of overrides: 'lora.r=8 lora.lora_alpha=16'."""
    warm_start: list[str] | None = setting(None, affects=STUDY)
    """Folders of earlier studies whose finished trials the sampler learns from, where their values lie in the space."""
    workers: int = ranged(1, 1, 1024, affects=NOTHING)
    """Processes that run trials at once; on this machine, or where a launcher of Hydra's puts them."""
    storage: str | None = setting(None, affects=STUDY)
    """Where the queue is kept: null is a journal file in the study's folder; postgresql://USER@HOST/DATABASE for
    machines that share no disk, the password in PGPASSWORD."""
    checkpoint_s: float = ranged(30.0, 0, affects=NOTHING)
    """Seconds of training between checkpoints; half as long after each death of a trial's worker."""
    lease_s: float = ranged(60.0, 1, affects=NOTHING)
    """Seconds without a sign of life after which a worker on another machine counts as dead; its trials go back to the
    queue."""
    max_retries: int = ranged(3, 0, 1000, affects=NOTHING)
    """A trial fails when its worker has died more often than this without progress in between, or twice because the
    kernel ran out of memory."""

    def problems(self) -> list[str]:
        out: list[str] = registry.PRUNERS.get(self.pruner).problems(self)
        if self.max_cost is not None and self.cost_per_hour is None:
            out.append(
                f"search.max_cost: needs search.cost_per_hour, what an hour of one worker costs, got {self.max_cost:g} "
                "alone"
            )
        if (self.storage or "").startswith("sqlite"):
            out.append(
                "search.storage: SQLite hands one trial to two workers (it ignores SELECT ... FOR UPDATE); leave it "
                "null for a journal file, or give postgresql://USER@HOST/DATABASE"
            )
        elif self.storage and not self.storage.startswith("postgresql://"):
            out.append(f"search.storage: must be null or postgresql://USER@HOST/DATABASE, got '{self.storage}'")
        return out


SECTIONS: dict[str, type] = {
    "model": ModelSpec,
    "task_type": TaskSpec,
    "lora": LoraSpec,
    "data": DataSpec,
    "train": TrainSpec,
    "tracking": TrackSpec,
    "search": SearchSpec,
}


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    model: ModelSpec
    task_type: TaskSpec
    lora: LoraSpec
    data: DataSpec
    train: TrainSpec
    tracking: TrackSpec
    search: SearchSpec
    outputs: str = setting("./outputs", affects=NOTHING)
    """Folder that holds all studies."""
    study: str | None = setting(None, affects=NOTHING)
    """Name of the study; null makes one from the date and time."""
    overrides: tuple[str, ...] = ()
    """The strings this trial was made from: pasting them after `python -m lorasweep` runs it again."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data for YAML or JSON: the trial, without its overrides and without `search`."""
        out = asdict(self)
        del out["overrides"], out["search"]
        return out

    def get(self, key: str) -> Any:
        """Return the value of a config path such as `lora.r`."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def affecting(self, what: Affects) -> dict[str, dict[str, Any]]:
        """Return the settings that affect `what`, by section and key; sections without one are left out."""
        out = {}
        for name in SECTIONS:
            section = getattr(self, name)
            keys = [f.name for f in fields(section) if what & affects(f)]
            if keys:
                values = asdict(section)
                out[name] = {key: values[key] for key in keys}
        return out


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a tree by config path: `lora.r`. A setting that is a mapping itself stays one."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if name in SECTIONS:
            out |= {f"{name}.{key}": setting for key, setting in value.items()}
        else:
            out[name] = value
    return out


def is_earlier_default(key: str, earlier: Any, value: Any) -> bool:
    """Return whether two values of a key are the default of an earlier version and today's, which do the same."""
    group, _, name = key.partition(".")
    found = next((f for f in fields(SECTIONS[group]) if f.name == name), None) if group in SECTIONS else None
    return found is not None and value == found.default and earlier == found.metadata.get("earlier", value)


@cache
def keys_affecting(what: Affects) -> tuple[str, ...]:
    """Return the config paths of the settings that affect `what`."""
    found: list[str] = []
    for name, section in SECTIONS.items():
        found += [f"{name}.{f.name}" for f in fields(section) if what & affects(f)]
    return tuple(found)


NAME_RULE = "must be letters, digits, '.', '_' or '-', at most 200, the last no '.', and no device's name on Windows"


def is_name(study: str) -> bool:
    """Return whether a study may be called so: its name is a folder's, and cannot lead out of the outputs folder."""
    folder = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", study) and not study.endswith(".")
    return bool(folder) and not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", study)


def trial_spec(tree: Mapping[str, Any], overrides: tuple[str, ...]) -> tuple[TrialSpec | None, list[str]]:
    """Return the spec of a nested mapping and its problems; the spec is None where there are any."""
    problems: list[str] = []
    parts: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        parts[name] = field_rules.section(cls, tree.get(name) or {}, name, known_keys(), problems)
    for name in ("outputs", "study"):
        value = tree.get(name)
        if value is not None and not isinstance(value, str):
            problems.append(f"{name}: must be a string, got {value!r}")
        elif value is not None and "\0" in value:
            problems.append(f"{name}: {field_rules.NO_NULL}, got {value!r}")
        parts[name] = value
    study = parts["study"]
    if isinstance(study, str) and not is_name(study):
        problems.append(f"study: {NAME_RULE}, got '{study}'")
    if parts["outputs"] is None:
        parts["outputs"] = "./outputs"
    unknown = set(tree) - set(SECTIONS) - {"outputs", "study"}
    problems += [f"{key}: no such key{did_you_mean(key, known_keys())}" for key in sorted(unknown)]
    if not problems and parts["model"].device_map is not None and parts["search"].workers > 1:
        workers = parts["search"].workers
        problems.append(f"search.workers: must be 1 with model.device_map, got {workers}; one trains on all GPUs")
    if problems:
        return None, problems
    return TrialSpec(**parts, overrides=overrides), []


@cache
def known_keys() -> list[str]:
    """Return every config path that may be overridden."""
    keys = ["outputs", "study"]
    for name, cls in SECTIONS.items():
        keys += [f"{name}.{f.name}" for f in fields(cls)]
    return keys
