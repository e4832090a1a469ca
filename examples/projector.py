"""The projector in a model of your own: audio and video tokens of any encoder go through together.

Run: python examples/projector.py
"""

import torch
from torch import nn

from llama_smop import SMoPProjector


class Connector(nn.Module):
    """Encoder features (B, S, 1024) to the language model's embeddings (B, S, 2048)."""

    def __init__(self, features: int = 1024, embeddings: int = 2048):
        super().__init__()
        self.projector = SMoPProjector(features, 2048, embeddings, num_experts=4, top_k=2, sharing="DEDR")

    def forward(self, audio, video, real):
        tokens = torch.cat([audio, video], dim=1)
        modality = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        modality[:, audio.shape[1] :] = 1
        out = self.projector(tokens, modality, mask=real)
        return out.hidden_states, 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss


def main(features: int = 1024, embeddings: int = 2048) -> float:
    torch.manual_seed(0)
    connector = Connector(features, embeddings)
    audio, video = torch.randn(2, 40, features), torch.randn(2, 10, features)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, 30:40] = False  # the second clip's audio is shorter: padding is routed nowhere
    embedded, router_losses = connector(audio, video, real)
    loss = embedded.square().mean() + router_losses  # your language model's loss here
    loss.backward()
    print(f"{tuple(embedded.shape)}, loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
