"""What the operators do not do, said in one line instead of by a wrong or a slow answer."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """PyTorch gives a custom operator's outputs no tangent: the derivative would silently be zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.func.jvp, dual tensors): "
            "use reverse mode, .backward() or torch.autograd.grad"
        )


def refuse_vmap(op: torch.library.CustomOpDef) -> None:
    """Without a rule PyTorch would call the operator once a sample, silently."""

    def rule(info, in_dims, *args):
        raise RuntimeError(
            f"{op._qualname} takes all tokens in one call and cannot run under vmap: "
            "flatten the mapped dimension into the tokens, (B, T, D) -> (B·T, D)"
        )

    op.register_vmap(rule)


def refuse_double_backward(backward_op: torch.library.CustomOpDef) -> None:
    """Gradients of `backward_op`'s outputs do not exist."""
    forward_name = backward_op._qualname.removesuffix("_bwd")

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{forward_name} cannot be differentiated twice: detach its gradients before building on them, "
            "or use plain PyTorch modules where second derivatives are needed"
        )

    backward_op.register_autograd(backward)
