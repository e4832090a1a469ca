"""Calls that must not be taken for an earlier one: for the tests of both backends' replays."""

from dataclasses import replace

import torch

from llama_smop.ops.self_check import Inputs, Model, make


def calls(model: Model, tokens: int) -> tuple[Inputs, list[tuple[Inputs, dict]]]:
    """→ a call's inputs; and inputs and options of others: another size, alignment, what is asked for, recomputed."""
    inputs = make(model, tokens, seed=1)
    shifted = torch.empty(inputs.x.numel() + 1, dtype=inputs.x.dtype)[1:].view_as(inputs.x).copy_(inputs.x)
    return inputs, [
        (make(model, tokens + 1, seed=2), {}),
        (replace(inputs, x=shifted), {}),
        (inputs, {"need_dx": False}),
        (inputs, {"recompute": "hz"}),
    ]
