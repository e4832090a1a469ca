"""Rename the tensors of a checkpoint by a table of rules, and report what became of every key."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama_smop.system.read_yaml import read_yaml


@dataclass(frozen=True)
class Rule:
    r"""Keys that match `pattern` wholly become `target`, in which \1, \2 … are the pattern's groups.

    A target `name[3]` is row 3 of the stacked tensor `name`, and `name[\1+4]` row 4 + group 1. With target None the
    key is left out, because of `why`.
    """

    pattern: str
    target: str | None
    why: str = ""


@dataclass
class KeyReport:
    """Every key of the source and of the model: what became of it."""

    used: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def check(self, source: str | Path, partial: bool) -> None:
        """ValueError when keys are missing or unexpected, unless `partial`."""
        if partial or not (self.missing or self.unexpected):
            return
        parts = [
            f"{len(keys)} {name} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for name, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        ]
        raise ValueError(
            f"{source}: {' and '.join(parts)}; give a key map that names them, or allow a partial load (--partial)"
        )

    def summary(self) -> str:
        return (
            f"{len(self.used)} used, {len(self.renamed)} renamed, {len(self.left_out)} left out, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )

    def to_dict(self) -> dict:
        return asdict(self)


def load_rules(path: str | Path) -> list[Rule]:
    """Rules from a YAML or JSON list of {pattern, target, why}; they go before the built-in ones.

    Raises:
        ValueError: no such file, not YAML, another structure, an unknown key, a pattern that is no regular expression,
            a target that asks for a group it does not have.
    """
    entries = read_yaml(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of rules, each with pattern, target and why")
    rules = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or "pattern" not in entry or set(entry) - {"pattern", "target", "why"}:
            raise ValueError(f"{path}: rule {number} must have pattern, target and optionally why, got {entry!r}")
        pattern, target, why = entry["pattern"], entry.get("target"), entry.get("why", "")
        if not all(isinstance(text, str) for text in (pattern, "" if target is None else target, why)):
            raise ValueError(f"{path}: rule {number}: pattern, target and why are text, got {entry!r}")
        try:
            groups = re.compile(pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: rule {number}: {pattern!r} is no regular expression: {error}") from None
        try:  # against an empty string in place of every group
            re.compile("()" * groups).match("").expand(target or "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{path}: rule {number}: {target!r} is no target for {pattern!r}: {error}") from None
        rules.append(Rule(pattern, target, why))
    return rules


def rename(
    state: dict[str, Tensor],
    rules: Sequence[Rule],
    expected: dict[str, torch.Size],
    *,
    optional: Iterable[str] = (),
    pad_columns: Iterable[str] = (),
) -> tuple[dict[str, Tensor], KeyReport]:
    """Tensors under the model's names, and the report of all keys.

    Args:
        expected: the model's names and shapes.
        optional: names that may be missing (tied weights).
        pad_columns: stacked tensors whose rows may be narrower in the last size; the rest is zeros.

    Raises:
        ValueError: a tensor of another shape than the model's, two keys for one place.
    """
    result: dict[str, Tensor] = {}
    filled: dict[str, set[int]] = {}
    report = KeyReport()
    for key, (rule, place) in match_keys(state, rules).items():
        if rule is None:
            report.unexpected.append(key)
            continue
        if place is None:
            report.left_out[key] = rule.why
            continue
        value, (target, row) = state[key], place
        target = _below_lora(target, expected)
        if target not in expected or (row is not None and row >= expected[target][0]):
            report.unexpected.append(key)
            continue
        _place(result, filled, key, value, target, row, expected[target], target in set(pad_columns))
        if key == target:
            report.used.append(key)
        else:
            report.renamed[key] = target if row is None else f"{target}[{row}]"
    for name, shape in expected.items():
        if name in filled and len(filled[name]) < shape[0]:
            report.missing += [f"{name}[{row}]" for row in range(shape[0]) if row not in filled[name]]
        elif name not in result and name not in set(optional):
            report.missing.append(name)
    return result, report


def match_keys(
    keys: Iterable[str], rules: Sequence[Rule]
) -> dict[str, tuple[Rule | None, tuple[str, int | None] | None]]:
    """For each key the first rule that knows it, and the name and row (None = the whole tensor) it goes to."""
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    result = {}
    for key in keys:
        match, rule = next(((m, r) for p, r in compiled if (m := p.fullmatch(key))), (None, None))
        place = None if rule is None or rule.target is None else _split_row(match.expand(rule.target))
        result[key] = (rule, place)
    return result


def _split_row(target: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)\[(\d+)(?:\+(\d+))?\]", target)
    return (match.group(1), int(match.group(2)) + int(match.group(3) or 0)) if match else (target, None)


def _below_lora(target: str, expected: dict[str, torch.Size]) -> str:
    """peft moves a projection that has LoRA to `….base_layer.…`."""
    head, _, leaf = target.rpartition(".")
    below = f"{head}.base_layer.{leaf}"
    return below if target not in expected and below in expected else target


def _place(result, filled, key, value, target, row, shape, may_pad) -> None:
    wanted = shape if row is None else shape[1:]
    narrower = may_pad and value.shape[:-1] == wanted[:-1] and value.shape[-1] < wanted[-1]
    if value.shape != wanted and not narrower:
        raise ValueError(f"{key} has shape {tuple(value.shape)}, but {target} needs {tuple(wanted)}")
    if row is None:
        if target in result:
            raise ValueError(f"two keys for {target}, the second is {key}")
        result[target] = value
        return
    if row in filled.setdefault(target, set()):
        raise ValueError(f"two keys for {target}[{row}], the second is {key}")
    filled[target].add(row)
    stacked = result.setdefault(target, torch.zeros(shape, dtype=value.dtype))
    stacked[row][..., : value.shape[-1]] = value
