"""Any Hugging Face mixture of experts with stacked weights on this package's grouped GEMM.

Run: python examples/transformers_experts.py
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from llama_smop.integrations import register


def main() -> float:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)  # or from_pretrained(...)
    tokens = torch.randint(0, 100, (2, 16))
    model.set_experts_implementation("eager")
    expected = model(tokens).logits

    register()  # makes "smop" (the best backend here) and "smop_torch" known to transformers
    model.set_experts_implementation("smop")

    out = model(tokens, labels=tokens)
    out.loss.backward()
    difference = (out.logits - expected).abs().max().item()
    print(f"largest difference from eager {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
