"""The eager loop over experts as a drop-in for `SMoPProjector`, so that a whole model can be timed with it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import leaf, router
from llama_smop.functional import SMoPOutput
from llama_smop.projector import SMoPProjector

PARTS = ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias")


class EagerProjector(nn.Module):
    """A copy of `source`'s parameters, one module per expert; same call, same output."""

    def __init__(self, source: SMoPProjector):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.top_k, self.sharing, self.num_experts = source.top_k, source.sharing, source.num_experts
        self.gates = nn.ParameterList([leaf(g) for g in source.gate_weight])
        self.experts = nn.ModuleList()
        for e in range(source.w1.shape[0]):
            expert = nn.Module()
            for name in PARTS:
                stacked = getattr(source, name)
                expert.register_parameter(name, None if stacked is None else leaf(stacked[e]))
            self.experts.append(expert)
        self.activation = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[source.activation]

    @property
    def w1(self) -> Tensor:
        """The model reads the projector's dtype from its first weight."""
        return self.experts[0].w1

    def forward(self, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        lead, flat = x.shape[:-1], x.reshape(-1, self.in_features)
        T, E, X = flat.shape[0], self.num_experts, len(self.experts)
        real = torch.ones(T, dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)
        which = torch.zeros(T, device=x.device) if len(self.gates) == 1 else modality.reshape(-1)
        logits = torch.zeros(T, E, device=x.device)
        weights = torch.zeros(T, self.top_k, device=x.device)
        experts = torch.full((T, self.top_k), X, device=x.device)
        balance, z_loss = [], []
        for m, gate in enumerate(self.gates):
            (rows,) = torch.where(real & (which == m))
            if rows.numel() == 0:
                continue
            found, p, e = router(flat[rows], gate, self.top_k)
            shift = m * E if self.sharing == "DEDR" else 0
            logits = logits.index_copy(0, rows, found.to(logits.dtype))
            weights = weights.index_copy(0, rows, p.to(weights.dtype))
            experts = experts.index_copy(0, rows, e + shift)
            share = F.one_hot(e, E).sum((0, 1)) / rows.numel()
            balance.append(E * (share * found.softmax(-1).mean(0)).sum())
            z_loss.append(found.logsumexp(-1).square().mean())
        y = flat.new_zeros(T, self.out_features)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(experts == e)
            if token.numel() == 0:
                continue
            h = self.activation(F.linear(flat[token], expert.w1, expert.b1))
            z = F.linear(h, expert.w2, expert.b2)
            if expert.ln_weight is not None:
                z = F.layer_norm(z, (self.out_features,), expert.ln_weight, expert.ln_bias)
            y = y.index_add(0, token, (z * weights[token, choice, None]).to(y.dtype))
        zero = logits.new_zeros(())
        return SMoPOutput(
            hidden_states=y.reshape(*lead, -1),
            router_logits=logits.reshape(*lead, -1),
            expert_indices=experts.int().reshape(*lead, -1),
            expert_weights=weights.reshape(*lead, -1),
            load_balancing_loss=sum(balance, zero) / max(1, len(balance)),
            router_z_loss=sum(z_loss, zero) / max(1, len(z_loss)),
            expert_counts=torch.bincount(experts[real].flatten(), minlength=X)[:X].int(),
        )
