"""`SMoPProjector`, the sparse mixture of projectors, and `DenseProjector`, the one it is compared with."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llama_smop import functional
from llama_smop.functional import SMoPOutput
from llama_smop.ops import checks, dispatch
from llama_smop.ops.router_losses import global_aux_losses


class SMoPProjector(nn.Module):
    """A router and top-K small MLP experts between speech and lip encoders and a language model.

        y = Σ_k w_k · LayerNorm_{e_k}(W2_{e_k} · act(W1_{e_k} x + b1_{e_k}) + b2_{e_k})

    `sharing` says what audio and video tokens have in common: JEJR one router and E experts for both; JEDR a router
    each, E experts for both; DEDR a router and E experts each. All three are one computation on stacked parameters
    with R routers and X experts (modality-major: expert m·E + e): `gate_weight (R, E, D)`, `w1 (X, H, D)`,
    `b1 (X, H)`, `w2 (X, O, H)`, `b2 (X, O)`, `ln_weight (X, O)`, `ln_bias (X, O)`.

    `global_aux_losses`: with several processes the auxiliary losses are those of their joint batch (`router_losses`).

    For an optimizer, `weight_decay.parameter_groups` spares the stacked biases and LayerNorm parameters from decay.

    Raises:
        ValueError: `top_k` outside [1, num_experts], an unknown sharing, activation, recompute or backend, a size
            below 1.
    """

    stacked_parameters = True  # for `weight_decay`: the first dimension counts experts, or routers
    gate_weight: nn.Parameter
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    ln_weight: nn.Parameter | None
    ln_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_experts: int = 4,
        top_k: int = 2,
        sharing: str = "DEDR",
        activation: str = "relu",
        layer_norm: bool = True,
        backend: str = "auto",
        eps: float = 1e-5,
        recompute: str | int = "none",
        global_aux_losses: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(
            num_experts=num_experts, in_features=in_features, hidden_features=hidden_features, out_features=out_features
        )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts] = [1, {num_experts}], got {top_k}")
        checks.options(activation, recompute)
        dispatch.check_backend(backend)
        R, X = checks.layout(sharing, num_experts)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.num_experts, self.top_k, self.sharing = num_experts, top_k, sharing
        self.activation, self.backend, self.eps, self.recompute = activation, backend, eps, recompute
        self.global_aux_losses = global_aux_losses
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_weight = nn.Parameter(torch.empty(R, num_experts, in_features, **factory))
        _add_mlps(self, X, layer_norm, factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.gate_weight, -bound, bound)
        _reset_mlps(self)

    def forward(self, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        """Project tokens.

        Args:
            x: (..., D).
            modality: (...) integer, 0 audio, 1 video; required by JEDR and DEDR, ignored by JEJR.
            mask: (...) bool, True = real token. A masked token yields 0, gets no gradient and counts nowhere.

        Raises:
            ValueError: a width or shape that does not fit. IndexError: a modality other than 0 and 1.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise _wrong_width(x, self.in_features)
        out = functional.smop(
            x,
            self.gate_weight,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.ln_weight,
            self.ln_bias,
            top_k=self.top_k,
            sharing=self.sharing,
            modality=modality,
            mask=mask,
            activation=self.activation,
            eps=self.eps,
            recompute=self.recompute,
            backend=self.backend,
        )
        if not self.global_aux_losses:
            return out
        assert out.router_logits is not None and out.expert_indices is not None
        balance, z_loss = global_aux_losses(
            out.router_logits.flatten(0, -2),
            out.expert_indices.flatten(0, -2),
            None if modality is None else modality.flatten(),
            routers=self.gate_weight.shape[0],
            num_experts=self.w1.shape[0],
        )
        return out._replace(load_balancing_loss=balance, router_z_loss=z_loss)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.hidden_features} -> {self.out_features}, {self.sharing}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation}, backend={self.backend}"
        )


class DenseProjector(nn.Module):
    """Llama-AVSR's projector: Linear, activation, Linear, an optional LayerNorm, one for each modality.

    Called as `SMoPProjector` is. A token's modality is its only expert, with weight 1, so both share their operators;
    there is nothing to route: the auxiliary losses are 0 and the routing is None. Parameters are stacked over
    modalities: `w1 (M, H, D)`, `b1 (M, H)`, `w2 (M, O, H)`, `b2 (M, O)`, `ln_weight (M, O)`, `ln_bias (M, O)`.
    """

    stacked_parameters = True  # for `weight_decay`: the first dimension counts modalities
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    ln_weight: nn.Parameter | None
    ln_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        modalities: int = 2,
        activation: str = "relu",
        layer_norm: bool = False,
        backend: str = "auto",
        eps: float = 1e-5,
        recompute: str | int = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(
            modalities=modalities, in_features=in_features, hidden_features=hidden_features, out_features=out_features
        )
        checks.options(activation, recompute)
        dispatch.check_backend(backend)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.modalities, self.activation, self.backend, self.eps = modalities, activation, backend, eps
        self.recompute = recompute
        _add_mlps(self, modalities, layer_norm, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_mlps(self)

    def forward(self, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        """Project tokens x (..., D) by the projector of their modality (...); masked tokens yield 0."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise _wrong_width(x, self.in_features)
        lead = x.shape[:-1]
        for name, ids in (("modality", modality), ("mask", mask)):
            if ids is not None and ids.shape != lead:
                raise ValueError(f"{name} must have x's leading shape {tuple(lead)}, got {tuple(ids.shape)}")
        checks.token_ids(modality, mask)
        if self.modalities == 1:
            experts = torch.zeros(lead, dtype=torch.int32, device=x.device)
        elif modality is None:
            raise ValueError(f"modality is required with {self.modalities} projectors: an integer for each token")
        else:
            if not torch.compiler.is_compiling():
                checks.in_range("modality", modality, 0, self.modalities - 1)
            experts = modality.to(torch.int32)
        if mask is not None:
            experts = torch.where(mask, experts, self.modalities)
        experts = experts.reshape(-1, 1)
        y = functional.expert_projection(
            x.reshape(-1, self.in_features),
            torch.ones(experts.shape, device=x.device),
            experts,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.ln_weight,
            self.ln_bias,
            activation=self.activation,
            eps=self.eps,
            recompute=self.recompute,
            backend=self.backend,
        )
        zero = torch.zeros((), device=x.device)
        return SMoPOutput(y.reshape(*lead, self.out_features), None, None, None, zero, zero, None)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features} -> {self.hidden_features} -> {self.out_features}"
        return f"{sizes}, modalities={self.modalities}, activation={self.activation}, backend={self.backend}"


def _add_mlps(module: "SMoPProjector | DenseProjector", count: int, layer_norm: bool, factory: dict[str, Any]) -> None:
    """Stacked parameters of `count` MLPs D -> H -> O, LayerNorm parameters None without `layer_norm`."""
    D, H, O = module.in_features, module.hidden_features, module.out_features
    module.w1 = nn.Parameter(torch.empty(count, H, D, **factory))
    module.b1 = nn.Parameter(torch.empty(count, H, **factory))
    module.w2 = nn.Parameter(torch.empty(count, O, H, **factory))
    module.b2 = nn.Parameter(torch.empty(count, O, **factory))
    module.ln_weight = nn.Parameter(torch.empty(count, O, **factory)) if layer_norm else None
    module.ln_bias = nn.Parameter(torch.empty(count, O, **factory)) if layer_norm else None


def _reset_mlps(module: "SMoPProjector | DenseProjector") -> None:
    """As `nn.Linear` and `nn.LayerNorm`: uniform in ±1/√fan_in; scale 1, shift 0."""
    for weight, bias in ((module.w1, module.b1), (module.w2, module.b2)):
        bound = 1 / math.sqrt(weight.shape[-1])
        nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(bias, -bound, bound)
    if module.ln_weight is not None and module.ln_bias is not None:
        nn.init.ones_(module.ln_weight)
        nn.init.zeros_(module.ln_bias)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _wrong_width(x: Tensor, in_features: int) -> ValueError:
    return ValueError(f"x must have in_features = {in_features} as its last size, got shape {tuple(x.shape)}")
