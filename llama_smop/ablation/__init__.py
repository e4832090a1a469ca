"""Ablations: grids of small trainings over sharing, experts, K, compression and seed."""

from llama_smop.ablation.run import ablate

__all__ = ["ablate"]
