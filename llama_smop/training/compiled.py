"""torch.compile, region by region: the projector and the layers of the language model, which share their code."""

import torch
from torch import nn


def compile_regions(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the projector and the language model's layers in place; names of parameters stay.

    The number of tokens is a variable of the graph from the start. Only `forward` is compiled: the hooks of FSDP and
    gradient checkpointing stay around it.
    """
    language_model = model.language_model
    layers = [m for m in language_model.modules() if type(m).__name__ in language_model._no_split_modules]
    for module in (model.multi_modal_projector, *layers):
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
