"""`smop` and `smop_torch` behind transformers' experts interface, on tiny random models."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

from llama_smop.integrations import register
from tests.rounding import assert_same_gradients, assert_same_sums

ADDITIONS = 1000  # two layers of five products of width 32 to 96 forward and back, a head, 18 tokens
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        layer_types=["full_attention", "sliding_attention"],
    ),
}  # fmt: skip
TOKENS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered():
    register()


def build(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager")
    with torch.no_grad():  # experts start near zero: make them matter
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.train()


def run(model, implementation: str):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    tokens = TOKENS.to(model.device)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.logits, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("implementation", ("smop", "smop_torch"))
@pytest.mark.parametrize("name", CONFIGS)
def test_models_equal_eager(name, implementation, device):
    model = build(name).to(device)
    expected, expected_grads = run(model, "eager")
    logits, grads = run(model, implementation)
    assert_same_sums(logits, expected, ADDITIONS, "the logits")
    assert_same_gradients(grads, expected_grads, ADDITIONS)


def test_generation_equals_eager():
    model = build("mixtral").eval()
    outputs = []
    for implementation in ("eager", "smop"):
        model.set_experts_implementation(implementation)
        outputs.append(model.generate(TOKENS[:1], max_new_tokens=6, do_sample=False))
    assert torch.equal(*outputs)


def test_compiles_to_one_graph():
    model = build("qwen3_moe").eval()
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    model.set_experts_implementation("smop")
    x, ids = torch.randn(7, 32), torch.randint(0, 6, (7, 3))
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    weights = torch.full((7, 3), 0.3)
    assert_same_sums(compiled(x, ids, weights.clone()), experts(x, ids, weights), ADDITIONS, "the output")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss"))
def test_skip_sentinels_contribute_nothing_and_take_no_gradient(name):
    model = build(name)
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    model.set_experts_implementation("smop")
    x = torch.randn(5, 32, requires_grad=True)
    ids = torch.tensor([[0, 4], [4, 4], [3, 9], [1, 2], [4, 1]])
    weights = torch.rand(5, 2, requires_grad=True)
    out = experts(x, ids, weights)
    expected = torch.zeros(5, 32)
    for t in range(5):
        for k in range(2):
            if ids[t, k] < 4:
                alone = experts(x[t : t + 1], ids[t : t + 1, k : k + 1], torch.ones(1, 1))[0]
                expected[t] += (weights[t, k] * alone).detach()
    assert_same_sums(out.detach(), expected, ADDITIONS, "the output")
    assert not out[1].any()
    out.square().sum().backward()
    assert not weights.grad[ids >= 4].any() and not x.grad[1].any() and x.grad[0].any()


def test_a_single_choice_may_be_skipped_too():
    experts = next(m for m in build("mixtral").modules() if hasattr(m, "gate_up_proj"))
    experts.config._experts_implementation = "smop"
    x = torch.randn(3, 32, requires_grad=True)
    out = experts(x, torch.tensor([[1], [4], [0]]), torch.ones(3, 1))
    out.square().sum().backward()
    assert not out[1].any() and not x.grad[1].any() and x.grad[0].any() and x.grad[2].any()


def test_low_precision_follows_the_weights():
    model = build("mixtral").to(torch.bfloat16)
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    x, ids, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    model.set_experts_implementation("eager")
    expected = experts(x.bfloat16(), ids, weights.bfloat16())
    model.set_experts_implementation("smop")
    assert experts(x, ids, weights).dtype == torch.float32  # float32 states over bfloat16 weights, as under autocast
    out = experts(x.bfloat16(), ids, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())


def test_experts_without_a_gate():
    """Plain experts (act(x·W1)·W2), transposed and not, as in NemotronH."""
    from llama_smop.integrations.transformers_experts import experts_forward

    w1, w2 = torch.randn(3, 10, 8), torch.randn(3, 8, 10)
    x, ids, weights = torch.randn(4, 8), torch.tensor([[0, 1], [2, 2], [1, 0], [2, 1]]), torch.rand(4, 2)
    expected = torch.stack(
        [sum(weights[t, k] * w2[e] @ (w1[e] @ x[t]).relu() for k, e in enumerate(ids[t])) for t in range(4)]
    )
    for transposed in (False, True):
        experts = SimpleNamespace(
            num_experts=3, has_gate=False, has_bias=False, is_transposed=transposed, act_fn=nn.ReLU(),
            up_proj=w1.transpose(1, 2) if transposed else w1, down_proj=w2.transpose(1, 2) if transposed else w2,
        )  # fmt: skip
        assert_same_sums(experts_forward(experts, x, ids, weights), expected, ADDITIONS, "the output")


def test_no_token_at_all():
    model = build("mixtral")
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    model.set_experts_implementation("smop")
    assert experts(torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.rand(0, 2)).shape == (0, 32)
