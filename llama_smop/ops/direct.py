"""An operator's implementation called straight, where the dispatcher would only stand in the way.

Tracers, compilers, dispatch modes, transforms and tensor subclasses must see a `torch.library` operator. It costs the
host about a tenth of a millisecond each time, and a GPU that has few tokens waits for the host. In plain eager mode
nobody looks: there the same functions run under a `torch.autograd.Function`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_smop.ops.autocast import Autocast

_SIMPLE = {Tensor, nn.Parameter, type(None), bool, int, float, str}


def call(
    op: torch.library.CustomOpDef,
    implementation: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Autocast | None = None,
) -> Callable:
    """→ a function of `op`'s arguments and results that takes the short way in plain eager mode.

    Args:
        implementation: what `op` does once its arguments are known to fit; the function's caller has checked them.
        setup_context, backward: those `op` is registered with; without them it has no gradient to give.
        autocast: the rule `op` is registered with.
    """
    function = None if backward is None else _function(op, implementation, setup_context, backward)

    def differentiable(*args):
        wanted = torch.is_grad_enabled() and any(type(a) in (Tensor, nn.Parameter) and a.requires_grad for a in args)
        if not wanted:
            return implementation(*args)
        return op(*args) if function is None else function.apply(*args)

    def shortest(*args):
        if not is_plain(args):
            return op(*args)
        device_type = args[0].device.type
        if autocast is None or not torch.is_autocast_enabled(device_type):
            return differentiable(*args)
        return autocast.run(differentiable, args, device_type)

    return shortest


def is_plain(args: tuple) -> bool:
    """Whether nothing watches: no tracer, mode, transform or profiler, only ordinary tensors that hold data."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )
    return not watched and all(type(a) in _SIMPLE for a in args) and not args[0].is_meta


def _function(op, implementation, setup_context, backward) -> type[torch.autograd.Function]:
    class Direct(torch.autograd.Function):
        # One `forward(ctx, ...)`: a separate setup_context would have PyTorch inspect the signature at every call.
        @staticmethod
        def forward(ctx, *args):
            output = implementation(*args)
            setup_context(ctx, args, output)
            return output

    Direct.backward = staticmethod(backward)
    Direct.__name__ = Direct.__qualname__ = op._qualname
    return Direct
