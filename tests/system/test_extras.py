"""The base install: torch and numpy give the projector; what needs more says which extra brings it."""

import subprocess
import sys
import tomllib
from pathlib import Path

from llama_smop.system.extras import DISTRIBUTIONS, remedy

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
# Every module that an extra brings, hidden from a fresh process.
HIDE = """
import sys

sys.modules.update(dict.fromkeys({hidden!r}))
"""


def brought(*extras: str) -> set[str]:
    lines = [line for extra in extras for line in EXTRAS[extra] if not line.startswith("llama-smop")]
    names = {line.split(">")[0].split("=")[0] for line in lines}
    return {MODULES.get(name, name) for name in names}


def without(hidden: set[str], script: str) -> subprocess.CompletedProcess:
    """Run `script` in a fresh process from which `hidden` modules cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + script], capture_output=True, text=True, cwd=ROOT
    )


def test_projector_operators_and_drop_in_need_torch_and_numpy_alone():
    script = """
import torch
from llama_smop import DenseProjector, SMoPProjector, functional
from llama_smop.integrations import replace_experts

x = torch.randn(2, 5, 8)
for projector in (SMoPProjector(8, 16, 8, sharing="JEJR"), DenseProjector(8, 16, 8, modalities=1)):
    projector(x).hidden_states.sum().backward()
a = functional.grouped_mm(torch.randn(4, 8), torch.randn(2, 8, 8), torch.tensor([1, 4], dtype=torch.int32))
assert a.shape == (4, 8)
assert "torch._dynamo" not in sys.modules, "the whole compiler was imported: half of the time of this import"
"""
    done = without(brought("gpu", "model", "train", "corpus", "shards"), script)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named_in_one_line():
    """First by what a program gets, then by the command line, where it ends the process."""
    script = """
try:
    from llama_smop import LlamaSmopProcessor
except ImportError as error:
    print(error)
from llama_smop.cli import main

main(["transcribe", "x"])
"""
    done = without(brought("model", "train"), script)
    assert done.returncode != 0
    for output in (done.stdout, done.stderr):
        assert 'pip install "llama-smop[model]"' in output.strip().splitlines()[-1]


def test_a_command_names_the_extra_of_what_it_lacks():
    done = without({"webdataset"}, "from llama_smop.cli import main; main(['corpus', 'shard', '.', '--out', 'x'])")
    assert done.returncode == 1
    assert done.stderr.strip().endswith('pip install "llama-smop[shards]"'), done.stderr


def test_the_remedy_of_a_stranger_is_its_own_name():
    assert remedy("nobody.inside") == "nobody is not installed: pip install nobody"
