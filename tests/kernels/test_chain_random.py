"""The comparison of test_chain.py over drawn lengths, routings, masks and mixtures of audio and video."""

import pytest

from llama_smop.ops.self_check import make
from tests.kernels.compare import MODELS, check, skip_unless_served
from tests.kernels.runners import triton_params

pytest.importorskip("hypothesis", reason="a GPU machine may lack it")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("runner", "name"), triton_params(("dedr-relu", 80, 90), ("jejr-gelu", 90), ("jedr-silu", 80), ("many-experts", 90))
)
def test_matches_the_definition_on_drawn_batches(runner, name):
    model = MODELS[name]
    skip_unless_served(runner, model)

    @settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        tokens=st.integers(65, 170),
        seed=st.integers(0, 99),
        skew=st.sampled_from([0.0, 8.0]),
        masked=st.sampled_from([0.0, 0.3]),
        video=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def compare(tokens, **drawn):
        check(runner, model, make(model, tokens, **drawn))

    with runner.running():
        compare()
