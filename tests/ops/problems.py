"""Inputs for the operator tests, and how results are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_smop.ops.checks import layout

PARAMETERS = ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias")


@dataclass
class Problem:
    """A projector's inputs. T tokens, D -> H -> O, E experts a router, top_k active."""

    x: Tensor
    gate_weight: Tensor
    parameters: dict[str, Tensor | None]
    modality: Tensor | None
    mask: Tensor | None
    top_k: int
    sharing: str

    @property
    def num_experts(self) -> int:
        """All of them: X."""
        return layout(self.sharing, self.gate_weight.shape[1])[1]

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "gate_weight": self.gate_weight, **self.parameters}
        return {name: t for name, t in named.items() if t is not None}

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same values, rounded to `dtype`, as fresh leaves that ask for gradients."""
        cast = {n: t.detach().to(dtype, copy=True).requires_grad_() for n, t in self.leaves().items()}
        parameters = {n: cast.get(n) for n in PARAMETERS}
        return Problem(cast["x"], cast["gate_weight"], parameters, self.modality, self.mask, self.top_k, self.sharing)


def make(
    T: int = 13,
    D: int = 6,
    H: int = 9,
    O: int = 7,
    E: int = 4,
    top_k: int = 2,
    sharing: str = "JEJR",
    *,
    bias: bool = True,
    layer_norm: bool = True,
    masked: bool = False,
    skew: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Unit-scale random inputs; `skew` pulls every router towards its first expert."""
    g = torch.Generator().manual_seed(seed)
    R, X = layout(sharing, E)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    gate = normal(R, E, D, scale=D**-0.5)
    x = normal(T, D)
    if skew:
        x[:, 0] = x[:, 0].abs() + 1
        gate[:, 0, 0] += skew
    parameters = {
        "w1": normal(X, H, D, scale=D**-0.5),
        "b1": normal(X, H) if bias else None,
        "w2": normal(X, O, H, scale=H**-0.5),
        "b2": normal(X, O) if bias else None,
        "ln_weight": 1 + normal(X, O, scale=0.3) if layer_norm else None,
        "ln_bias": normal(X, O, scale=0.3) if layer_norm else None,
    }
    modality = torch.randint(0, 2, (T,), generator=g) if R == 2 else None
    mask = torch.rand(T, generator=g) > 0.3 if masked else None
    return Problem(x, gate, parameters, modality, mask, top_k, sharing).to(dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖; absolute where the expected values are all (nearly) zero."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    scale = expected.norm().item()
    return (got - expected).norm().item() / (scale if scale > 1e-6 else 1.0)
