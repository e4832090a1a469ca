"""`SMoPProjector`, the sparse mixture of projectors, and `DenseProjector`, the one it is compared with."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_smop import functional
from llama_smop.functional import SMoPOutput
from llama_smop.ops import checks, dispatch
from llama_smop.ops.router_losses import aux_losses
from llama_smop.ops.router_network import router_logits
from llama_smop.projector_forms import INPUT_NORM_EPS, PAPER, SMoPForm

# Names in `functional`, and of the parameters and state-dict keys of earlier versions -> names of the parameters.
FORMER_NAMES = {"b1": "bias1", "b2": "bias2", "ln_weight": "layernorm_weight", "ln_bias": "layernorm_bias"}


class StackedMLPs(nn.Module):
    """Parameters of X MLPs D -> H -> O, stacked: `w1 (X, H, D)`, `bias1 (X, H)`, `w2 (X, O, H)`, `bias2 (X, O)`, and
    `layernorm_weight (X, O)`, `layernorm_bias (X, O)`, which are None without LayerNorm.

    transformers' Trainer spares parameters with "bias" or "layernorm" in their names from weight decay, so these have
    them. `b1`, `b2`, `ln_weight` and `ln_bias`, the names of earlier versions and of `functional`, read the same
    parameters, and state dicts with them load.
    """

    stacked_parameters = True  # for `weight_decay`: the first dimension counts experts, routers or modalities
    w1: nn.Parameter
    bias1: nn.Parameter
    w2: nn.Parameter
    bias2: nn.Parameter
    layernorm_weight: nn.Parameter | None
    layernorm_bias: nn.Parameter | None

    b1 = property(lambda self: self.bias1)
    b2 = property(lambda self: self.bias2)
    ln_weight = property(lambda self: self.layernorm_weight)
    ln_bias = property(lambda self: self.layernorm_bias)

    def _add_mlps(
        self, X: int, D: int, H: int, O: int, layer_norm: bool, factory: dict[str, Any], gated: bool = False
    ) -> None:
        first = 2 * H if gated else H
        self.w1 = nn.Parameter(torch.empty(X, first, D, **factory))
        self.bias1 = nn.Parameter(torch.empty(X, first, **factory))
        self.w2 = nn.Parameter(torch.empty(X, O, H, **factory))
        self.bias2 = nn.Parameter(torch.empty(X, O, **factory))
        self.layernorm_weight = nn.Parameter(torch.empty(X, O, **factory)) if layer_norm else None
        self.layernorm_bias = nn.Parameter(torch.empty(X, O, **factory)) if layer_norm else None

    def reset_parameters(self) -> None:
        """As `nn.Linear` and `nn.LayerNorm`: uniform in ±1/√fan_in; scale 1, shift 0."""
        for weight, bias in ((self.w1, self.bias1), (self.w2, self.bias2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        if self.layernorm_weight is not None and self.layernorm_bias is not None:
            nn.init.ones_(self.layernorm_weight)
            nn.init.zeros_(self.layernorm_bias)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for former, name in FORMER_NAMES.items():
            if prefix + former in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + former)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SMoPProjector(StackedMLPs):
    """A router and top-K small MLP experts between speech and lip encoders and a language model.

        y = Σ_k w_k · LayerNorm_{e_k}(W2_{e_k} · act(W1_{e_k} x + bias1_{e_k}) + bias2_{e_k})

    `sharing` says what audio and video tokens have in common: JEJR one router and E experts for both; JEDR a router
    each, E experts for both; DEDR a router and E experts each. All three are one computation on stacked parameters
    with R routers and X experts (modality-major: expert m·E + e): `gate_weight (R, E, D)` and those of `StackedMLPs`.

    `global_aux_losses`: with several processes the auxiliary losses are those of their joint batch (`router_losses`).

    The further options make it the layer of other papers and codes; docs/operators.md has a table of their formulas:
        shared_experts: S experts more that every token goes through, with weight 1; the last of the stacked ones.
        input_norm: "rms" or "layer": a norm of the input, of its own scale (and shift), before router and experts.
        gated: experts with a gate, act(Wg x + bg) ⊙ (Wu x + bu); `w1` is (X, 2·H, D), gate rows first.
        normalize_weights, weight_scale: whether the K weights sum to 1, and what they are multiplied with.
        router: "linear", or "mlp" with a hidden layer of `router_hidden` units and a ReLU.
        router_bias: a bias of the logits.  router_jitter: ε of the factors U(1 − ε, 1 + ε) on them in training.
        balance: the load-balancing loss. "switch" is `route`'s, "mse" Σ_e (P_e − 1/E)² of the mean probabilities P,
            None is 0.
        merge: "utterance" runs one MLP a clip, the experts averaged by the clip's mean probabilities
            (`merged_projection`): then x is (clips, tokens, D), `top_k` has no part in it, no expert is chosen, and
            balance is "mse" or None.

    Raises:
        ValueError: `top_k` outside [1, num_experts], an unknown sharing, activation, recompute or backend, a size
            below 1, options that do not go together.
    """

    gate_weight: nn.Parameter
    gate_bias: nn.Parameter | None
    router_weight: nn.Parameter | None
    router_bias: nn.Parameter | None
    input_layernorm_weight: nn.Parameter | None
    input_layernorm_bias: nn.Parameter | None

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
        *,
        shared_experts: int = 0,
        input_norm: str | None = None,
        gated: bool = False,
        normalize_weights: bool = True,
        weight_scale: float = 1.0,
        router: str = "linear",
        router_hidden: int = 512,
        router_bias: bool = False,
        router_jitter: float = 0.0,
        balance: str | None = "switch",
        merge: str | None = None,
    ):
        super().__init__()
        checks.whole(
            1,
            num_experts=num_experts,
            in_features=in_features,
            hidden_features=hidden_features,
            out_features=out_features,
        )
        checks.active_experts(top_k, num_experts)
        checks.true_or_false(layer_norm=layer_norm, global_aux_losses=global_aux_losses)
        checks.epsilon(eps)
        checks.options(activation, recompute)
        dispatch.check_backend(backend)
        form = SMoPForm(
            shared_experts, input_norm, gated, normalize_weights, weight_scale, router, router_hidden, router_bias,
            router_jitter, balance, merge,
        )  # fmt: skip
        form.check()
        R, X = checks.layout(sharing, num_experts)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.num_experts, self.top_k, self.sharing = num_experts, top_k, sharing
        self.activation, self.backend, self.eps, self.recompute = activation, backend, eps, recompute
        self.global_aux_losses, self.form, self.routed_experts = global_aux_losses, form, X
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **factory)) if wanted else None

        mlp, width = router == "mlp", router_hidden if router == "mlp" else in_features
        self.gate_weight = nn.Parameter(torch.empty(R, num_experts, width, **factory))
        self.gate_bias = parameter(router_bias, R, num_experts)
        self.router_weight = parameter(mlp, R, router_hidden, in_features)
        self.router_bias = parameter(mlp, R, router_hidden)
        self.input_layernorm_weight = parameter(input_norm is not None, in_features)
        self.input_layernorm_bias = parameter(input_norm == "layer", in_features)
        self._add_mlps(X + shared_experts, in_features, hidden_features, out_features, layer_norm, factory, gated)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in ((self.gate_weight, self.gate_bias), (self.router_weight, self.router_bias)):
            if weight is not None:
                bound = 1 / math.sqrt(weight.shape[-1])
                nn.init.uniform_(weight, -bound, bound)
                if bias is not None:
                    nn.init.uniform_(bias, -bound, bound)
        if self.input_layernorm_weight is not None:
            nn.init.ones_(self.input_layernorm_weight)
        if self.input_layernorm_bias is not None:
            nn.init.zeros_(self.input_layernorm_bias)
        super().reset_parameters()

    def forward(self, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        """Project tokens.

        Args:
            x: (..., D).
            modality: (...) integer, 0 audio, 1 video; required by JEDR and DEDR, ignored by JEJR.
            mask: (...) bool, True = real token. A masked token yields 0, gets no gradient and counts nowhere.

        Raises:
            ValueError: a width or shape that does not fit. IndexError: a modality other than 0 and 1.
        """
        if not isinstance(x, Tensor):
            checks.are_tensors(x=x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise _wrong_width(x, self.in_features)
        if self.form != PAPER:
            return _with_other_losses(self, _another_form(self, x, modality, mask), modality, mask)
        out = functional.smop(
            x,
            self.gate_weight,
            self.w1,
            self.bias1,
            self.w2,
            self.bias2,
            self.layernorm_weight,
            self.layernorm_bias,
            top_k=self.top_k,
            sharing=self.sharing,
            modality=modality,
            mask=mask,
            activation=self.activation,
            eps=self.eps,
            recompute=self.recompute,
            backend=self.backend,
        )
        return _with_other_losses(self, out, modality, mask) if self.global_aux_losses else out

    def extra_repr(self) -> str:
        return ", ".join([
            f"{self.in_features} -> {self.hidden_features} -> {self.out_features}, {self.sharing}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation}, backend={self.backend}",
            *self.form.described(),
        ])  # fmt: skip


class DenseProjector(StackedMLPs):
    """Llama-AVSR's projector: Linear, activation, Linear, an optional LayerNorm, one for each modality.

    Called as `SMoPProjector` is. A token's modality is its only expert, with weight 1, so both share their operators;
    there is nothing to route: the auxiliary losses are 0 and the routing is None. The parameters are those of
    `StackedMLPs`, stacked over modalities.
    """

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
        checks.whole(
            1,
            modalities=modalities,
            in_features=in_features,
            hidden_features=hidden_features,
            out_features=out_features,
        )
        checks.true_or_false(layer_norm=layer_norm)
        checks.epsilon(eps)
        checks.options(activation, recompute)
        dispatch.check_backend(backend)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.modalities, self.activation, self.backend, self.eps = modalities, activation, backend, eps
        self.recompute = recompute
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._add_mlps(modalities, in_features, hidden_features, out_features, layer_norm, factory)
        self.reset_parameters()

    def forward(self, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        """Project tokens x (..., D) by the projector of their modality (...); masked tokens yield 0."""
        checks.are_tensors(x=x)
        checks.are_tensors_or_none(modality=modality, mask=mask)
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
            self.bias1,
            self.w2,
            self.bias2,
            self.layernorm_weight,
            self.layernorm_bias,
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


def _wrong_width(x: Tensor, in_features: int) -> ValueError:
    return ValueError(f"x must have in_features = {in_features} as its last size, got shape {tuple(x.shape)}")


def _another_form(self: SMoPProjector, x: Tensor, modality: Tensor | None, mask: Tensor | None) -> SMoPOutput:
    """`forward` of every form but the paper's; its losses are those of "switch" or, of a merge, zero."""
    form = self.form
    checks.are_tensors_or_none(modality=modality, mask=mask)
    for name, ids in (("modality", modality), ("mask", mask)):
        if ids is not None and ids.shape != x.shape[:-1]:
            raise ValueError(f"{name} must have x's leading shape {tuple(x.shape[:-1])}, got {tuple(ids.shape)}")
    checks.token_ids(modality, mask)
    if self.sharing == "JEJR":
        modality = None
    needs_logits = form.needs_logits(self.training)
    if mask is not None and (form.input_norm or needs_logits):
        x = x.masked_fill(~mask[..., None], 0.0)  # padding may hold anything; a norm or a product would spread NaN
    x = _input_norm(self, x)
    logits = None
    if needs_logits:
        jitter = form.router_jitter if self.training else 0.0
        logits = router_logits(
            x, self.gate_weight, self.gate_bias, self.router_weight, self.router_bias, modality, jitter
        )
    parameters = self.w1, self.bias1, self.w2, self.bias2, self.layernorm_weight, self.layernorm_bias
    options: dict[str, Any] = {
        "activation": self.activation, "gated": form.gated, "eps": self.eps, "recompute": self.recompute,
        "backend": self.backend, "modality": modality, "mask": mask,
    }  # fmt: skip
    if form.merge:
        assert logits is not None
        if x.dim() != 3:
            raise ValueError(f'merge="utterance" needs clips, x of shape (clips, tokens, D), got {tuple(x.shape)}')
        y = functional.merged_projection(x, logits, *parameters, **options)
        zero = torch.zeros((), device=x.device)
        return SMoPOutput(y, logits, None, None, zero, zero, None)
    return functional.smop(
        x, self.gate_weight if logits is None else None, *parameters, top_k=self.top_k, sharing=self.sharing,
        shared_experts=form.shared_experts, normalize_weights=form.normalize_weights,
        weight_scale=form.weight_scale, router_logits=logits, **options,
    )  # fmt: skip


def _input_norm(self: SMoPProjector, x: Tensor) -> Tensor:
    weight, bias = self.input_layernorm_weight, self.input_layernorm_bias
    if self.form.input_norm is None or weight is None:
        return x
    eps, shape = INPUT_NORM_EPS[self.form.input_norm], (self.in_features,)
    if self.form.input_norm == "rms":
        return F.rms_norm(x, shape, weight, eps)
    return F.layer_norm(x, shape, weight, bias, eps)


def _with_other_losses(
    self: SMoPProjector, out: SMoPOutput, modality: Tensor | None, mask: Tensor | None
) -> SMoPOutput:
    """`out` with the losses of the form, and of all processes' joint batch where that was asked for."""
    form = self.form
    if form.balance == "switch" and not self.global_aux_losses:
        return out
    if form.balance is None and not self.global_aux_losses and not form.merge:  # the z-loss is there
        return _with_losses(out, torch.zeros_like(out.load_balancing_loss), out.router_z_loss)
    assert out.router_logits is not None
    balance, z_loss = aux_losses(
        out.router_logits.flatten(0, -2),
        None if out.expert_indices is None else out.expert_indices.flatten(0, -2),
        None if modality is None else modality.flatten(),
        None if mask is None else mask.flatten(),
        routers=self.gate_weight.shape[0],
        balance=form.balance,
        joint=self.global_aux_losses,
    )
    return _with_losses(out, balance, z_loss)


def _with_losses(out: SMoPOutput, balance: Tensor, z_loss: Tensor) -> SMoPOutput:
    """`out._replace`, which torch 2.11 does not compile."""
    return SMoPOutput(*out[:4], balance, z_loss, out.expert_counts)
