"""Weight decay shrinks matrices, kernels and embeddings, never biases, norms or slopes, stacked or not."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from llama_smop.models.tiny import build_tiny
from llama_smop.training import fsdp
from llama_smop.training.setbacks import Setbacks
from llama_smop.training.trainer import SmopTrainer
from llama_smop.training.weight_decay import decayed_names, parameter_groups

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}
MULTIPLIES = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding


def model(**settings):
    torch.manual_seed(0)
    return build_tiny(["bin", "blue"], **SIZES, **settings)[0]


def spared(module) -> set[str]:
    return {name for name, _ in module.named_parameters()} - set(decayed_names(module))


def test_of_stacked_parameters_the_matrices_are_decayed():
    vectors = {"bias1", "bias2", "layernorm_weight", "layernorm_bias"}
    assert spared(model().multi_modal_projector) == vectors
    assert (
        spared(model(kind="dense").multi_modal_projector)
        == vectors & dict(model(kind="dense").multi_modal_projector.named_parameters()).keys()
    )


def test_norms_and_slopes_are_spared_whatever_they_are_called():
    """Every parameter of the towers and the language model, by the kind of its module."""
    whole = model(ctc_weight=0.5)
    decayed, kinds = set(decayed_names(whole)), set()
    for prefix, module in whole.named_modules():
        if prefix.startswith("multi_modal_projector") or "parametrizations" in prefix:
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            multiplies = isinstance(module, MULTIPLIES) and name.endswith(".weight")
            assert (name in decayed) == (multiplies and parameter.dim() > 1), name
            kinds.add(type(module))
    assert {nn.GroupNorm, nn.PReLU, nn.LayerNorm, nn.Conv3d, nn.Embedding} <= kinds


def test_a_zero_gradient_shrinks_what_is_decayed_and_leaves_the_rest():
    projector = model().multi_modal_projector
    for parameter in projector.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    AdamW(parameter_groups(projector, 0.5), lr=0.1).step()
    shrunk = {name for name, p in projector.named_parameters() if (p != 1).all()}
    assert shrunk == {"gate_weight", "w1", "w2"}
    assert all((p == 1).all() for name, p in projector.named_parameters() if name not in shrunk)


@pytest.mark.parametrize("kind", ("smop", "dense"))
def test_a_plain_trainer_spares_the_same_of_the_projector(kind, tmp_path):
    """Inside a user's model, whose Trainer knows parameters by their names."""
    projector = nn.Sequential(nn.Linear(4, 16), model(kind=kind).multi_modal_projector)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1)
    groups = Trainer(model=projector, args=args).create_optimizer().param_groups
    names = {p: n for n, p in projector.named_parameters()}
    spared_by_it = {names[p] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert spared_by_it == spared(projector)
    assert {"1.bias1", "1.bias2"} <= spared_by_it


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1)
    return SmopTrainer(model=model(), args=args, plan=None, setbacks=Setbacks(None, 0, 1))


def test_a_training_decays_by_this_rule(trainer):
    decayed, rest = trainer.create_optimizer().param_groups
    expected = parameter_groups(trainer.model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    for group, own in zip((decayed, rest), expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in own["params"]]


@pytest.mark.parametrize("sharded", (False, True))
def test_a_training_goes_on_from_a_checkpoint_of_the_earlier_groups(trainer, sharded, tmp_path):
    """From when transformers' rule alone made them; the sharded training reads its optimizer's state in its own way."""
    ours = trainer.model
    by_name = set(Trainer.get_decay_parameter_names(None, ours))
    names = {p: n for n, p in ours.named_parameters() if p.requires_grad}
    # Then the projector's were b1, b2, ln_weight and ln_bias, of which it spared the last.
    by_name |= {f"multi_modal_projector.{name}" for name in ("bias1", "bias2", "layernorm_weight")}
    earlier = AdamW(
        [
            {"params": [p for p, n in names.items() if (n in by_name) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, 0.1), (False, 0.0))
        ]
    )
    for number, parameter in enumerate(names):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    earlier.step()
    torch.save(earlier.state_dict(), tmp_path / "optimizer.pt")
    now = AdamW(parameter_groups(ours, 0.1)) if sharded else trainer.create_optimizer()
    assert [len(g["params"]) for g in now.param_groups] != [len(g["params"]) for g in earlier.param_groups]
    if sharded:
        fsdp.load_optimizer(now, ours, tmp_path / "optimizer.pt")
    else:
        now.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for parameter, name in names.items():
        assert torch.equal(now.state[parameter]["exp_avg"], earlier.state[parameter]["exp_avg"]), name
    kept = {n: v["exp_avg"] for n, v in now.state_dict()["state"].items()}
    now.load_state_dict(now.state_dict())
    assert all(torch.equal(v["exp_avg"], kept[n]) for n, v in now.state_dict()["state"].items()), "its own is changed"
