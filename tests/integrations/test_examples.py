"""The snippets of the README's "Use it in your code" are these files."""

import runpy
from pathlib import Path

import pytest

from tests.rounding import two_orders

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_projector():
    assert 0 < load("projector.py")(features=48, embeddings=64) < 10


@pytest.mark.parametrize("name", ("replace_experts.py", "transformers_experts.py"))
def test_same_numbers_before_and_after(name, capsys):
    assert load(name)() < two_orders(1000)  # of numbers of about 1; layers of width 256
    assert "False" not in capsys.readouterr().out


def test_every_example_is_tested():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "projector.py", "replace_experts.py", "transformers_experts.py"
    }  # fmt: skip
