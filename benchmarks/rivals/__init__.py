"""The implementations that are timed: ours, peers that compute the same function, and dense projectors."""

from benchmarks.rivals import dense, eager, grouped, libraries, ours, transformers_experts
from benchmarks.rivals.base import Layer, Mismatch, Reference, Rival, check, errors

ALL: tuple[Rival, ...] = (
    *ours.RIVALS,
    eager.RIVAL,
    grouped.TORCH,
    grouped.PACKAGE,
    dense.ALL_EXPERTS,
    *dense.PROJECTORS,
    *transformers_experts.RIVALS,
    *libraries.RIVALS,
)
BY_NAME = {r.name: r for r in ALL}

__all__ = ["ALL", "BY_NAME", "Layer", "Mismatch", "Reference", "Rival", "check", "errors"]
