"""Declares the workloads and makes their inputs.

Sizes are the paper's: D 1024, H 2048, O 2048 / 3072 / 4096 for Llama 3.2-1B / 3.2-3B / 3.1-8B, E 4, K 2.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROUTINGS = ("balanced", "zipf", "one")  # uniform; rank^-1.2; every token to the same K experts
EXPERTS = ("projector", "mlp", "swiglu")
PASSES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

LLAMA_WIDTHS = {"Llama 3.2-1B": 2048, "Llama 3.2-3B": 3072, "Llama 3.1-8B": 4096}
# At the published rates (4, 2) a second is 12.5 audio and 12.5 video tokens.
UTTERANCE_TOKENS = 150  # 6 s, audio and video
TRAINING_TOKENS = 1500  # a batch of 1500 video frames, audio and video
HEADLINE_TOKENS = (64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Workload:
    """One layer, one batch.

    expert: "projector" is the paper's (biases, ReLU, LayerNorm). "mlp" (Linear, ReLU, Linear without biases) and
    "swiglu" (gated) are what libraries for language models can compute, at O = D.
    sharing: with two routers the first half of the tokens is audio, the rest video.
    """

    tokens: int
    dtype: str = "bfloat16"
    in_features: int = 1024
    hidden_features: int = 2048
    out_features: int = 2048
    num_experts: int = 4
    top_k: int = 2
    routing: str = "balanced"
    sharing: str = "JEJR"
    expert: str = "projector"

    def __post_init__(self):
        for name, allowed in (("routing", ROUTINGS), ("expert", EXPERTS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @property
    def key(self) -> str:
        w = self
        return (
            f"T{w.tokens} {w.in_features}-{w.hidden_features}-{w.out_features} E{w.num_experts} K{w.top_k} "
            f"{w.routing} {w.sharing} {w.dtype} {w.expert}"
        )

    @property
    def routers(self) -> int:
        return 1 if self.sharing == "JEJR" else 2

    @property
    def total_experts(self) -> int:
        return self.num_experts * (2 if self.sharing == "DEDR" else 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def has_bias(self) -> bool:
        return self.expert == "projector"

    @property
    def has_layer_norm(self) -> bool:
        return self.expert == "projector"

    @property
    def up_features(self) -> int:
        """Rows of the first matrix: H, or gate and up together."""
        return self.hidden_features * (2 if self.expert == "swiglu" else 1)

    def blocks(self) -> list[tuple[int, int, int]]:
        """(router, first token, end) of each modality's contiguous tokens."""
        T = self.tokens
        return [(0, 0, T)] if self.routers == 1 else [(0, 0, (T + 1) // 2), (1, (T + 1) // 2, T)]


@dataclass
class Problem:
    """A workload's tensors on a device. Parameters in the stacked layout; biases and LayerNorm may be None."""

    workload: Workload
    x: Tensor  # (T, D)
    dy: Tensor  # (T, O)
    modality: Tensor | None  # (T,) int32
    gate_weight: Tensor  # (R, E, D)
    w1: Tensor  # (X, H or 2H, D)
    b1: Tensor | None  # (X, H)
    w2: Tensor  # (X, O, H)
    b2: Tensor | None  # (X, O)
    ln_weight: Tensor | None  # (X, O)
    ln_bias: Tensor | None  # (X, O)

    PARAMETERS = ("gate_weight", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that exist, by name."""
        return {n: getattr(self, n) for n in self.PARAMETERS if getattr(self, n) is not None}

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {n: t.to(dtype) for n, t in (("x", self.x), ("dy", self.dy), *self.parameters().items())}
        return replace(self, **tensors)


def make(workload: Workload, device: torch.device | str, seed: int = 0) -> Problem:
    """Random inputs of unit scale with the workload's routing.

    Tokens are noise whose component along the gate's rows is replaced, so that their logits are given: those of the
    chosen experts are at least 1 above the others, and rounding cannot change the choice. So all dtypes and
    implementations route alike, and their outputs can be compared.
    """
    w, device = workload, torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    D, H, O, X, E = w.in_features, w.hidden_features, w.out_features, w.total_experts, w.num_experts
    dtype = w.torch_dtype
    gate = (normal(w.routers, E, D) / D**0.5).to(dtype)
    x = normal(w.tokens, D)
    for router, start, stop in w.blocks():
        g = gate[router].float()
        logits = uniform(-0.5, 0.5, stop - start, E)
        chosen = _choices(w, stop - start, generator, device)
        logits.scatter_add_(1, chosen, torch.full(chosen.shape, 2.0, device=device))
        x[start:stop] += (logits - x[start:stop] @ g.t()) @ torch.linalg.solve(g @ g.t(), g)
    modality = None
    if w.routers == 2:
        modality = torch.zeros(w.tokens, dtype=torch.int32, device=device)
        modality[w.blocks()[1][1] :] = 1
    return Problem(
        workload=w,
        x=x.to(dtype),
        dy=normal(w.tokens, O).to(dtype),
        modality=modality,
        gate_weight=gate,
        w1=(uniform(-1, 1, X, w.up_features, D) / D**0.5).to(dtype),
        b1=(uniform(-1, 1, X, H) / D**0.5).to(dtype) if w.has_bias else None,
        w2=(uniform(-1, 1, X, O, H) / H**0.5).to(dtype),
        b2=(uniform(-1, 1, X, O) / H**0.5).to(dtype) if w.has_bias else None,
        ln_weight=(1 + 0.1 * normal(X, O)).to(dtype) if w.has_layer_norm else None,
        ln_bias=(0.1 * normal(X, O)).to(dtype) if w.has_layer_norm else None,
    )


def _choices(w: Workload, tokens: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(tokens, K) distinct experts of each token."""
    E, K = w.num_experts, w.top_k
    if w.routing == "one":
        return torch.arange(K, device=device).expand(tokens, K)
    share = torch.ones(E, device=device) if w.routing == "balanced" else torch.arange(1, E + 1, device=device) ** -1.2
    if tokens == 0:
        return torch.empty(0, K, dtype=torch.int64, device=device)
    return torch.multinomial(share.expand(tokens, E), K, generator=generator)


# ------------------------------------------------------------------------------------------------------ collections


def headline(dtype: str = "bfloat16") -> list[Workload]:
    """The main shapes: the 1B projector, E 4, K 2, balanced, T 64 to 16384."""
    return [Workload(T, dtype) for T in HEADLINE_TOKENS]


def real_counts(dtype: str = "bfloat16") -> list[Workload]:
    """One utterance of 6 s and a training batch of 1500 frames, as the published model is built (DEDR)."""
    return [Workload(T, dtype, sharing="DEDR") for T in (UTTERANCE_TOKENS, TRAINING_TOKENS)]


def variations(dtype: str = "bfloat16") -> list[Workload]:
    """One axis changed at a time, around T 4096."""
    base = Workload(4096, dtype)
    return [
        *(replace(base, out_features=o) for o in LLAMA_WIDTHS.values() if o != base.out_features),
        *(replace(base, sharing=s) for s in ("JEDR", "DEDR")),
        *(replace(base, routing=r) for r in ROUTINGS if r != base.routing),
        *(replace(base, num_experts=e) for e in (8, 16)),
        *(replace(base, top_k=k) for k in (1, 4)),
        *(replace(base, dtype=d) for d in ("float16", "float32") if d != base.dtype),
        replace(base, tokens=32768),
        replace(base, tokens=UTTERANCE_TOKENS, routing="one"),
    ]


def library_shapes(dtype: str = "bfloat16") -> list[Workload]:
    """Shapes that libraries for language models also compute: O = D, no biases, no LayerNorm, plain and gated."""
    return [Workload(T, dtype, out_features=1024, expert=kind) for kind in ("mlp", "swiglu") for T in (256, 4096)]


def tiny(workload: Workload) -> Workload:
    """The same workload at a size for dry runs."""
    w = workload
    return replace(
        w,
        tokens=max(2, min(24, w.tokens // 64)),
        in_features=32,
        hidden_features=48,
        out_features=32 if w.out_features == w.in_features else 40,
    )
