"""Keyword arguments of a forward that passes them on to the language model: which are known, an error for others."""

import difflib
import inspect
from collections.abc import Iterable, Mapping

from torch import nn
from transformers.utils import TransformersKwargs

# Arguments of transformers' loss functions, which receive all remaining keywords.
LOSS_ARGUMENTS = ("shift_labels", "ignore_index")


def known_to(*models: nn.Module) -> frozenset[str]:
    """The keywords that the forward of one of these models, or transformers called by it, uses."""
    own = [p for model in models for p in inspect.signature(type(model).forward).parameters.values()]
    named = {p.name for p in own if p.kind is not p.VAR_KEYWORD} - {"self"}
    return frozenset(named | TransformersKwargs.__annotations__.keys() | set(LOSS_ARGUMENTS))


def refuse_unknown(given: Mapping[str, object], known: Iterable[str]) -> None:
    """TypeError for a keyword that nothing reads, with the nearest known one; None counts as not given."""
    for name, value in given.items():
        if value is not None and name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}{meant}")
