"""FSDP2 through accelerate: what is sharded together, and checkpoints that one process could have written.

A checkpoint holds whole tensors under the names and numbers that an unsharded training gives them, so a run may go on
with another strategy or another number of processes.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from llama_smop.models.avhubert import FRONT_BLOCKS
from llama_smop.projector import DenseProjector, SMoPProjector
from llama_smop.training import weight_decay


def settings() -> dict:
    """For TrainingArguments. Every process builds the whole model on the CPU and moves unit after unit to its GPU."""
    config = {"version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": config}


def plan(args: TrainingArguments, model: nn.Module) -> None:
    """Tell accelerate what to shard as one unit.

    Weights are gathered in the dtype they are kept in, and autocast lowers them for the products, as without sharding:
    accelerate's own policy would add up the gradients of the processes in bfloat16 and round the loss to it.
    """
    args.fsdp_plugin_args |= {
        "transformer_cls_names_to_wrap": units(model),
        "mixed_precision_policy": MixedPrecisionPolicy(),
    }


def enable_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> None:
    """accelerate switches FSDP on where there is a GPU only; its code and PyTorch's run on a CPU as well."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP


def units(model: nn.Module) -> list[str]:
    """Classes whose modules are sharded by themselves: layers of the towers and the language model, the projector.

    What is left (embeddings, convolutions in front of the towers, heads) is gathered for the whole step.
    """
    names = {*model._no_split_modules, SMoPProjector.__name__, DenseProjector.__name__} - {*FRONT_BLOCKS}
    return sorted(names & {type(module).__name__ for module in model.modules()})


@torch.no_grad()
def gather(state):
    """A state with whole tensors, on the CPU, in place of sharded ones; shared ones stay shared.

    Every process must take part; only the first gets the tensors, the others None.
    """
    whole = {}

    def gathered(value: DTensor) -> Tensor | None:
        if id(value) not in whole:
            tensor = value.full_tensor()
            whole[id(value)] = tensor.detach().cpu() if dist.get_rank() == 0 else None
        return whole[id(value)]

    return tree_map_only(DTensor, gathered, state)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return gather(model.state_dict(keep_vars=True))


def scatter(value, like: Tensor):
    """This process's part of a whole tensor that belongs to the parameter `like`."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        # Each process has read the same file: there is nothing to send.
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


@torch.no_grad()
def load_weights(model: nn.Module, file: Path) -> None:
    """Put the weights that `file` has into a sharded model; frozen ones that it leaves out stay."""
    own = model.state_dict()
    for name, value in load_file(file).items():
        own[name].copy_(scatter(value, own[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    """Put a whole optimizer state into the optimizer of a sharded model.

    Not by torch.distributed.checkpoint: it makes up a state for parameters that have had no gradient yet, which the
    training that is gone on with would not have had.
    """
    state = weight_decay.by_this_rule(torch.load(file, map_location="cpu", weights_only=True, mmap=True), model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        number: {name: scatter(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state)
