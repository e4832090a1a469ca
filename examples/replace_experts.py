"""One line speeds up a mixture that exists already; its checkpoints stay as they are.

Run: python examples/replace_experts.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from llama_smop.integrations import replace_experts


class EagerMixture(nn.Module):
    """What released code often looks like: a loop over experts with masks and index_add_."""

    def __init__(self, dim: int = 256, hidden: int = 512, out: int = 256, num_experts: int = 4, top_k: int = 2):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out), nn.LayerNorm(out))
            for _ in range(num_experts)
        )

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, chosen = F.softmax(logits, dim=-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        out = x.new_zeros(x.shape[0], self.experts[0][2].out_features)
        for e, expert in enumerate(self.experts):
            tokens, k = torch.where(chosen == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, k, None])
        return out.view(*hidden_states.shape[:-1], -1), logits


def main() -> float:
    torch.manual_seed(0)
    model = nn.ModuleDict({"projector": EagerMixture()})
    x = torch.randn(2, 30, 256)
    before, checkpoint = model["projector"](x)[0], model.state_dict()

    report = replace_experts(model)  # before the optimizer is made; report.undo() puts the originals back
    print(report)

    after = model["projector"](x)[0]
    model.load_state_dict(checkpoint)  # old checkpoints keep loading, and new ones load in the old code
    difference = (after - before).abs().max().item()
    print(f"same keys: {list(model.state_dict()) == list(checkpoint)}, largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
