"""Many small trainings that differ in one thing: sharing, experts, K, compression, seed."""

from llama_smop.ablation.run import ablate

__all__ = ["ablate"]
