"""`@operator`: a function on tensors becomes a `torch.library` operator, with a fast path in plain eager mode.

A NamedTuple among the function's arguments, and as its result, is laid flat in the operator's schema, under the names
of its fields. So the registered operator is flat, and everything below it passes the tuples.

Tracers, compilers, dispatch modes, transforms and tensor subclasses must see a registered operator. Calling one costs
the host about a tenth of a millisecond, and a GPU that has few tokens waits for the host. In plain eager mode nothing
watches: there the same function runs under a `torch.autograd.Function`.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))


class Operator:
    """Call it with the function's arguments, checked by the caller; the result is a plain tuple.

    `op` is the registered operator, `torch.ops.<name>`, which checks its arguments itself.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        fake: Callable,
        check: Callable | None,
        gradient: tuple[Callable, Callable] | None,
        lowered: Collection[str],
        derivative_of: str | None,
    ):
        self.function = function
        signature = inspect.signature(function, eval_str=True)
        self._tuples = [_named_tuple(p.annotation) for p in signature.parameters.values()]

        def registered(*flat):
            args = self._nested(flat)
            if check is not None:
                check(*args)
            return tuple(self.run(args))

        def shapes(*flat):
            args = self._nested(flat)
            if check is not None:
                check(*args)
            return tuple(fake(*args))

        flat_signature = _flat_signature(signature)
        registered.__signature__ = flat_signature  # type: ignore[attr-defined]
        schema = torch.library.infer_schema(registered, mutates_args=())
        self.op = torch.library.custom_op(name, registered, mutates_args=(), schema=schema)
        self.op.register_fake(shapes)
        self.lowered = {i for i, n in enumerate(flat_signature.parameters) if n in lowered}
        self._register_autocast(name)
        if derivative_of is not None:
            gradient = _save_nothing, _refuse_second_derivative(derivative_of)
        else:
            self.op.register_vmap(_refuse_vmap(name))
        self._recorded = None if gradient is None else self._register_gradient(*gradient)

    def __call__(self, *args) -> tuple:
        flat: list[Any] = []
        for arg in args:  # by methods: torch 2.11's compiler adds no NamedTuple to a list
            if isinstance(arg, tuple):
                flat.extend(arg)
            else:
                flat.append(arg)
        if not is_plain(flat):
            refuse_forward_mode(self.op._qualname, flat)
            refuse_functional_gradients(self.op._qualname, flat)
            return self.op(*flat)
        recorded = None  # by autograd
        if torch.is_grad_enabled():
            for value in flat:
                if isinstance(value, Tensor) and value.requires_grad:
                    recorded = self._recorded
                    break
        device_type = flat[0].device.type
        if autocast_is_on(device_type):
            with without_autocast(device_type):
                flat = self._lower(flat, device_type)
                args = self._nested(flat)
                return self.run(args) if recorded is None else recorded(*flat, args)
        return self.run(args) if recorded is None else recorded(*flat, args)

    def run(self, args) -> tuple:
        return on_its_device(self.function, *args)

    def _nested(self, flat: Sequence) -> tuple:
        args, i = [], 0
        for kind in self._tuples:
            if kind is None:
                args.append(flat[i])
                i += 1
            else:
                args.append(kind(*flat[i : i + len(kind._fields)]))
                i += len(kind._fields)
        return tuple(args)

    # ---------------------------------------------------------------------------------------------- differentiation

    def _register_gradient(self, save: Callable, backward: Callable) -> Callable:
        """→ the function of the flat arguments, and of the arguments themselves, that autograd records."""

        def gradients(ctx, *grads):
            found: list = []
            for kind, given in zip(self._tuples, backward(ctx, *grads), strict=True):
                if kind is None:
                    found.append(given)
                else:
                    found.extend([None] * len(kind._fields) if given is None else given)
            return tuple(found)

        def setup_context(ctx, inputs, output):
            save(ctx, self._nested(inputs), output)

        self.op.register_autograd(gradients, setup_context=setup_context)

        class Direct(torch.autograd.Function):
            # One `forward(ctx, ...)`: a separate setup_context would have PyTorch inspect the signature at every call.
            @staticmethod
            def forward(ctx, *flat_and_args):
                args = flat_and_args[-1]
                output = self.run(args)
                save(ctx, args, output)
                return tuple(output)

            @staticmethod
            def backward(ctx, *grads):
                return *gradients(ctx, *grads), None

        Direct.__name__ = Direct.__qualname__ = self.op._qualname
        # `apply` without what it does for transforms, of which `is_plain` has seen none.
        return super(torch.autograd.Function, Direct).apply

    # ------------------------------------------------------------------------------------------------------ autocast
    #
    # `torch.library.register_autocast` lowers every floating-point argument; gate weights and LayerNorm parameters of
    # an expert projection are to keep their float32 values. So operators name what follows autocast. A backward lowers
    # nothing: what it is given has the dtypes of its forward, and its products must not be lowered on the way.

    def _register_autocast(self, name: str) -> None:
        namespace, short = name.split("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")  # the rules live as long as this object
        for device_type, key in _AUTOCAST_KEYS.items():
            self._library.impl(short, self._autocast_rule(device_type), key.name, with_keyset=True)

    def _autocast_rule(self, device_type: str) -> Callable:
        def rule(_, *flat):
            with without_autocast(device_type):
                return self.op._opoverload(*self._lower(flat, device_type))

        return rule

    def _lower(self, flat, device_type: str) -> list:
        dtype = torch.get_autocast_dtype(device_type)
        return [lowered(value, dtype) if i in self.lowered else value for i, value in enumerate(flat)]


def operator(
    name: str,
    *,
    fake: Callable,
    check: Callable | None = None,
    gradient: tuple[Callable, Callable] | None = None,
    lowered: Collection[str] = (),
    derivative_of: str | None = None,
) -> Callable[[Callable], Operator]:
    """Register a function as the operator `name`.

    The function takes tensors, numbers, strings and NamedTuples of tensors; its first argument is a tensor.

    Args:
        fake: the same arguments → empty results of the right shapes and dtypes.
        check: raises for arguments that do not fit; needs no values, and no dtypes, which autocast may change yet.
        gradient: (save, backward). `save(ctx, arguments, results)` and `backward(ctx, *gradients)` → a gradient or
            None for each argument, a tuple of them for a NamedTuple.
        lowered: names of the tensors that autocast lowers.
        derivative_of: the operator whose gradient this one computes: it cannot be differentiated again.
    """
    return lambda function: Operator(name, function, fake, check, gradient, lowered, derivative_of)


def is_plain(flat: Sequence) -> bool:
    """Whether nothing watches: no tracer, mode, transform or profiler, only ordinary tensors that hold data."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    return _PLAIN.issuperset(map(type, flat)) and not flat[0].is_meta


def on_its_device(function: Callable, tensor: Tensor, *args) -> tuple:
    """`function(tensor, *args)`, on the device of the tensor: launches go to the current one."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return function(tensor, *args)
    return function(tensor, *args)


def autocast_is_on(device_type: str) -> bool:
    return device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator computes `tensor`: autocast's where it is on, else the tensor's own."""
    device_type = tensor.device.type
    if device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def lowered(value: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value


def without_autocast(device_type: str) -> AbstractContextManager:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[device_type]))


def _named_tuple(annotation: Any) -> Any:
    """The annotation itself if it is a NamedTuple, else None."""
    return annotation if isinstance(annotation, type) and hasattr(annotation, "_fields") else None


def _flat_signature(signature: inspect.Signature) -> inspect.Signature:
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = _named_tuple(parameter.annotation)
        if kind is None:
            parameters.append(parameter)
        else:
            for name, annotation in inspect.get_annotations(kind).items():
                parameters.append(inspect.Parameter(name, parameter.kind, annotation=annotation))
    returned = _named_tuple(signature.return_annotation)
    result = (
        signature.return_annotation if returned is None else tuple.__class_getitem__((Tensor,) * len(returned._fields))
    )
    return inspect.Signature(parameters, return_annotation=result)


# --------------------------------------------------------------------------------------------------------- refusals


def refuse_forward_mode(name: str, values: list) -> None:
    """PyTorch gives a custom operator's outputs no tangent: the derivative would silently be zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.func.jvp, dual tensors): "
            "use reverse mode, .backward() or torch.autograd.grad"
        )


def refuse_functional_gradients(name: str, values: list) -> None:
    """PyTorch differentiates custom operators by autograd alone, and would say so without their name."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    differentiates = transform is not None and transform.key() == torch._C._functorch.TransformType.Grad
    if differentiates and torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
        raise RuntimeError(
            f"{name} has no derivative under torch.func (grad, vjp, jacrev): use .backward() or torch.autograd.grad"
        )


def _refuse_vmap(name: str) -> Callable:
    """Without a rule PyTorch would call the operator once a sample, silently."""

    def rule(info, in_dims, *args):
        raise RuntimeError(
            f"{name} takes all tokens in one call and cannot run under vmap: "
            "flatten the mapped dimension into the tokens, (B, T, D) -> (B·T, D)"
        )

    return rule


def _save_nothing(ctx, args, output) -> None:
    pass


def _refuse_second_derivative(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name} cannot be differentiated twice: detach its gradients before building on them, "
            "or use plain PyTorch modules where second derivatives are needed"
        )

    return backward
