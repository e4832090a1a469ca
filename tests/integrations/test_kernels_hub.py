"""The kernels as a folder for Hugging Face's `kernels` package: loaded without this package, and next to it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from examples.replace_experts import EagerMixture
from llama_smop import SMoPProjector
from llama_smop.cli import main
from llama_smop.integrations import kernels_hub
from tests.rounding import assert_same_gradients, assert_same_sums

pytest.importorskip("kernels.layer")  # tests/kernels answers to the name alone
import kernels

VARIANT = "build/torch-universal"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return kernels_hub.write(tmp_path_factory.mktemp("hub") / "kernels")


@pytest.fixture(scope="module")
def copy(folder):
    return kernels.get_local_kernel(folder)


def test_it_is_loaded_where_this_package_is_not_installed(folder):
    code = f"""
import sys
sys.modules["llama_smop"] = None  # its import fails
from pathlib import Path
import torch
from kernels import get_local_kernel
smop = get_local_kernel(Path({str(folder)!r}))
projector = smop.SMoPProjector(16, 24, 20)
out = projector(torch.randn(7, 16), torch.arange(7) % 2)
out[0].sum().backward()
print(out[0].shape, projector.w1.grad.isfinite().all())
foreign = {{name.partition(".")[0] for name in sys.modules}} & {{"transformers", "peft", "av", "scipy"}}
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "torch.Size([7, 20]) tensor(True)", done.stderr


def test_a_copy_computes_the_same_beside_the_package(copy):
    assert copy.SMoPProjector is not SMoPProjector
    torch.manual_seed(0)
    ours, theirs = SMoPProjector(16, 24, 20), copy.SMoPProjector(16, 24, 20)
    theirs.load_state_dict(ours.state_dict())
    x, modality = torch.randn(11, 16), torch.arange(11) % 2
    for compiled in (False, True):  # a compiler sees the registered operators, plain eager mode does not
        results = []
        for projector in (ours, theirs):
            projector.zero_grad()
            call = torch.compile(projector, backend="aot_eager", fullgraph=True) if compiled else projector
            out = call(x, modality)
            (out[0].square().sum() + out.router_z_loss).backward()
            results.append((out[0].detach(), [p.grad for p in projector.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        assert all(map(torch.equal, results[0][1], results[1][1]))


def test_nothing_in_a_copy_names_this_package(folder):
    for path in (folder / VARIANT).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.partition(".")[0] == "llama_smop"], (path, node.lineno)


def test_kernelize_runs_a_mixture_of_another_library(copy, folder):
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    tokens = torch.randint(1, 40, (2, 9))

    def run():
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    logits, gradients = run()
    kernels.replace_kernel_forward_from_hub(MixtralExperts, "Experts")
    layer = kernels.LocalLayerRepository(folder, layer_name="Experts")
    try:
        with kernels.use_kernel_mapping({"Experts": {"cpu": layer}}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    finally:
        del MixtralExperts.kernel_layer_name
    experts = model.model.layers[0].mlp.experts
    assert experts.forward.__func__ is copy.layers.Experts.forward
    new_logits, new_gradients = run()
    assert_same_sums(new_logits, logits, additions=1000)
    assert_same_gradients(new_gradients, gradients, additions=1000)


def test_the_projectors_layer_fits_the_projector(copy, folder):
    projector = SMoPProjector(16, 24, 20)
    x, modality = torch.randn(11, 16), torch.arange(11) % 2
    before = projector(x, modality)
    layer = kernels.LocalLayerRepository(folder, layer_name="SMoPProjector")
    kernels.replace_kernel_forward_from_hub(SMoPProjector, "SMoPProjector")
    try:
        with kernels.use_kernel_mapping({"SMoPProjector": {"cpu": layer}}, inherit_mapping=False):
            kernels.kernelize(projector, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    finally:
        del SMoPProjector.kernel_layer_name
    after = projector(x, modality)
    assert type(after) is copy.SMoPOutput and torch.equal(after[0], before[0])


def test_a_copy_replaces_mixtures(copy):
    model = nn.ModuleDict({"projector": EagerMixture(dim=16, hidden=24, out=16)})
    x = torch.randn(2, 5, 16)
    before = model["projector"](x)[0]
    copy.replace_experts(model)
    assert type(model["projector"]).__module__.startswith(copy.__name__)
    assert_same_sums(model["projector"](x)[0], before, additions=100)


def test_it_writes_over_its_own_folder_only(tmp_path):
    out = tmp_path / "out"
    main(["kernels", str(out)])
    stale = out / VARIANT / "llama_smop" / "of_an_earlier_version.py"
    stale.touch()
    (out / "README.md").write_text("mine")
    main(["kernels", str(out)])
    assert not stale.exists(), "a file of an earlier version is left in the copy"
    assert (out / "README.md").read_text() == "mine"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="not a folder that this command may replace"):
        main(["kernels", str(tmp_path / "other")])
    assert (tmp_path / "other" / "thesis.txt").exists()
