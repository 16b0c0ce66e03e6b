"""The head of a base that is a finished classifier already: kept where its classes are the data's, else made new.

A head of another size cannot be kept. One of the same size is kept only where the checkpoint's config names the very
classes of the data (`id2label`); then the task takes the checkpoint's order, so that the adapter fits the base as it is
on the hub. Where the names tell nothing, as transformers' LABEL_0, a head in an unknown order would be read wrongly.
"""

import re
from collections.abc import Sequence
from typing import Any

GENERIC = re.compile(r"(?i)label_(\d+)")
"""transformers' name of a class that nobody named."""

CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
"""Auto classes whose heads have an output a class."""


def labels(config: Any, auto_class: str) -> list[str]:
    """Return the class names of a checkpoint whose head is a finished one of this kind, else []."""
    built = [str(a) for a in getattr(config, "architectures", None) or []]
    if auto_class not in CLASSIFIERS or not any(a.endswith(auto_class.removeprefix("AutoModel")) for a in built):
        return []
    names = config.id2label or {}
    return [str(names.get(i, names.get(str(i), f"LABEL_{i}"))) for i in range(config.num_labels)]


def in_order_of(head: Sequence[str], classes: Sequence[str]) -> list[str] | None:
    """Return the data's classes in the head's order; None where the head's names are not these classes."""
    by_name = {_plain(c): c for c in classes}
    if len(head) != len(classes) or len(by_name) != len(classes):
        return None
    named = [by_name.get(_plain(name)) for name in head]
    if None not in named and len(set(named)) == len(named):
        return [c for c in named if c is not None]
    numbers = [GENERIC.fullmatch(name) for name in head]
    numbered = [by_name.get(m[1]) for m in numbers if m]
    if len(numbered) == len(classes) and None not in numbered:  # classes 0, 1, 2 of a head that nobody named
        return [c for c in numbered if c is not None]
    return None


def _plain(name: str) -> str:
    """Return a name without what people write in several ways: case, spaces, `_` and `-` between words."""
    return re.sub(r"[\s_]+", " ", name.strip().casefold())


def is_kept(head: Sequence[str], classes: Sequence[str], regression: bool) -> bool:
    """Tell whether a finished head is used as it is: for regression, one that gives one number."""
    if regression:
        return len(head) == 1
    return bool(classes) and in_order_of(head, classes) == list(classes)


def note(head: Sequence[str], classes: Sequence[str], regression: bool) -> str:
    """Return what becomes of a finished head, for a person to read."""
    has = f"the base is a finished classifier of {_counted(head)}"
    if is_kept(head, classes, regression):
        return f"{has}: its head is kept and trains on" + ("" if regression else ", its classes in the base's order")
    if regression:
        return f"{has}; its head is replaced by a new one for a number"
    why = "other names" if len(head) == len(classes) else f"the data have {len(classes)}"
    if len(head) == len(classes) and all(GENERIC.fullmatch(name) for name in head):
        why = "names that do not say which is which"
    return f"{has} ({why}): its head is replaced by a new one"


def _counted(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({shown})"


def heads(model: Any) -> tuple[str, ...]:
    """Return the modules beside the model proper that no language model's checkpoint has: a task's new head."""
    if model.get_output_embeddings() is not None:
        return ()
    children = {name: module for name, module in model.named_children() if any(True for _ in module.parameters())}
    if model.base_model_prefix not in children:
        return ()
    return tuple(name for name in children if name != model.base_model_prefix)
