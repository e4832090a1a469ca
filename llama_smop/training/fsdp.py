"""FSDP2 through accelerate: the sharded units, and checkpoints of whole tensors.

A checkpoint has the format of an unsharded training, so a run may resume with another strategy or another number of
processes.
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
from llama_smop.models.former_names import present_name
from llama_smop.projector import DenseProjector, SMoPProjector
from llama_smop.training import weight_decay


def settings() -> dict:
    """Arguments of TrainingArguments. Every rank builds the whole model on the CPU and moves it to its GPU by units."""
    config = {"version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": config}


def plan(args: TrainingArguments, model: nn.Module) -> None:
    """Set the sharded units and the mixed-precision policy in `args.fsdp_plugin_args`.

    Weights are gathered in the dtype they are stored in, and autocast casts them for the products, as without sharding.
    accelerate's default policy would reduce gradients in bfloat16 and round the loss to bfloat16.
    """
    args.fsdp_plugin_args |= {
        "transformer_cls_names_to_wrap": units(model),
        "mixed_precision_policy": MixedPrecisionPolicy(),
    }


def enable_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Enable FSDP on a CPU: accelerate enables it only with a GPU, though its code also runs on a CPU."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP


def units(model: nn.Module) -> list[str]:
    """Names of the classes whose modules are FSDP units: layers of the towers and the language model, the projector.

    The other parameters (embeddings, the towers' convolutional front ends, heads) stay gathered for the whole step.
    """
    names = {*model._no_split_modules, SMoPProjector.__name__, DenseProjector.__name__} - {*FRONT_BLOCKS}
    return sorted(names & {type(module).__name__ for module in model.modules()})


@torch.no_grad()
def gather(state):
    """Replace the sharded tensors of `state` by whole ones on the CPU; tied tensors stay tied.

    Every rank must call it. Rank 0 gets the tensors, the others None.
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
    """This rank's shard of a whole tensor that belongs to the parameter `like`."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        # Every rank has read the same file, so no rank sends anything.
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


@torch.no_grad()
def load_weights(model: nn.Module, file: Path) -> None:
    """Load the weights in `file` into a sharded model; weights that it does not have keep their values."""
    own = model.state_dict()
    for name, value in load_file(file).items():
        mine = own[present_name(name)]
        mine.copy_(scatter(value, mine))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    """Load a whole optimizer state into the optimizer of a sharded model.

    torch.distributed.checkpoint is not used: it creates a state for parameters that have had no gradient yet, which
    an uninterrupted training does not have.
    """
    state = weight_decay.regrouped(torch.load(file, map_location="cpu", weights_only=True, mmap=True), model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        number: {name: scatter(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state)
