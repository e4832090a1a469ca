"""The language model's loss without its logits: the head runs where labels are, and for a few positions at a time.

About a fifth of a batch's positions are text. With a vocabulary of 128k the logits of all positions, their softmax and
its gradient would be half of what a training step of the 1B model holds.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import is_liger_kernel_available

from llama_smop.models.outputs import CACHE
from llama_smop.models.units import IGNORED_LABEL
from llama_smop.ops.operator import autocast_dtype

KINDS = ("auto", "chunked", "liger", "plain")
CHUNK = 128  # positions; with a vocabulary of 128k their logits are 66 MB in float32
# Causal models whose logits are the head's plain product, without a scale or a soft cap.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")


def check_fused_loss(kind: str, device: torch.device) -> None:
    """Check that a kind of loss can be computed on a device.

    Raises:
        ValueError: an unknown name; "liger" away from a GPU or without the package.
    """
    if kind not in KINDS:
        raise ValueError(f"fused_loss must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "liger" and device.type != "cuda":
        raise ValueError(f'fused_loss "liger" needs a CUDA device, got {device}; use "chunked"')
    if kind == "liger" and not is_liger_kernel_available():
        raise ValueError('fused_loss "liger" needs the package: pip install liger-kernel; or use "chunked"')


def resolve(kind: str, language_model: PreTrainedModel) -> str:
    """One of "chunked", "liger" and "plain" for this language model; "auto" is "chunked" where its head allows it.

    Raises:
        ValueError: as `check_fused_loss`, and an explicit choice for a model whose logits are not a plain product.
    """
    check_fused_loss(kind, language_model.get_output_embeddings().weight.device)
    reason = _obstacle(language_model)
    if kind == "auto":
        return "plain" if reason else "chunked"
    if kind != "plain" and reason:
        raise ValueError(f'fused_loss "{kind}" {reason}, or use "plain"')
    return kind


def _obstacle(language_model: PreTrainedModel) -> str | None:
    """Why the logits must be made by calling the head, None where its weight may be used by itself."""
    head, model_type = language_model.get_output_embeddings(), language_model.config.model_type
    if model_type not in PLAIN_HEADS:
        return f"knows the heads of {', '.join(PLAIN_HEADS)}, this language model is a {model_type}"
    if nn.Linear not in (type(head), *_under_fsdp2(head)) or head.bias is not None:
        return f"needs a linear head without a bias, got {head}"
    # Offloading, as accelerate's, fetches a weight when its module is called.
    called = hasattr(head, "_hf_hook") or head._forward_pre_hooks or head._forward_hooks
    if called and not isinstance(head, FSDPModule):
        return "needs a head without hooks, which offloading adds"
    if isinstance(head.weight, DTensor) and not isinstance(head, FSDPModule):
        return "needs the head's whole weight, and here it is one of a tensor-parallel model"
    return None


def _under_fsdp2(module: nn.Module) -> tuple[type, ...]:
    """The classes of a module before FSDP2 replaced its class by one derived from it and from FSDPModule."""
    return type(module).__bases__ if isinstance(module, FSDPModule) else ()


def without_logits(
    kind: str, language_model: PreTrainedModel, labels: Tensor | None, kwargs: dict, *, strict: bool
) -> str | None:
    """The kind of loss to compute without logits, "chunked" or "liger"; None where the loss needs the logits.

    kwargs: the language model's other arguments. strict: raise where the loss needs the logits.

    Raises:
        ValueError: as `resolve`; with `strict`, a loss that needs the logits.
    """
    asked, kind = kind, resolve(kind, language_model)
    own = {"shift_labels", "ignore_index"} & kwargs.keys()  # arguments of the language model's own loss function
    if labels is None:
        lacking = "needs labels"
    elif kind == "plain":
        lacking = 'does not go with fused_loss "plain"' if asked == "plain" else _obstacle(language_model)
    elif own:
        lacking = f"does not go with {' and '.join(sorted(own))}"
    else:
        return kind
    if strict:
        raise ValueError(f"skip_logits {lacking}")
    return None


def target_positions(labels: Tensor) -> Tensor:
    """(N,) int64, the positions of a flattened (B, L) whose next token is a label.

    Their number depends on the values, so on a GPU this waits for the device; the collator makes them on the CPU.
    """
    wanted = nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))
    return wanted.flatten().nonzero().squeeze(1)


def forward_without_logits(
    language_model: PreTrainedModel,
    labels: Tensor,
    positions: Tensor | None,
    kind: str,
    num_items_in_batch: Tensor | int | None = None,
    **arguments,
) -> CausalLMOutputWithPast:
    """The output of `language_model(labels=labels, **arguments)` without logits; `kind` is "chunked" or "liger".

    positions: of `target_positions`, made here when None. num_items_in_batch: what the sum is divided by in place of
    the number of labels.
    """
    positions = target_positions(labels) if positions is None else positions
    outputs = language_model.get_decoder()(**arguments)
    rows = outputs.last_hidden_state.flatten(0, 1)[positions]
    targets = labels.flatten()[positions + 1]
    head = language_model.get_output_embeddings()
    if isinstance(head, FSDPModule):  # gathers its weight when called, and keeps it until the backward
        head(rows[:0])
    if isinstance(head.weight, DTensor):
        raise ValueError(f'fused_loss "{kind}" needs a head that is not resharded after its forward; or use "plain"')
    total = (_liger if kind == "liger" else linear_cross_entropy)(rows, head.weight, targets)
    return CausalLMOutputWithPast(
        loss=total / (len(positions) if num_items_in_batch is None else num_items_in_batch),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **{CACHE: outputs.get(CACHE)},
    )


@torch.compiler.disable  # a loop over a number of chunks that changes from batch to batch
def linear_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Sum over n of cross_entropy(rows[n]·weightᵀ, targets[n]), holding the logits of `chunk` rows at a time.

    Products are computed in the dtype of `rows` (under autocast in its dtype), the loss in float32 or better. Equal to
    the ordinary computation up to rounding, with one backward: gradients are made in the forward pass, where the
    logits are, and only scaled in the backward.

    Args:
        rows: (N, O). weight: (V, O). targets: (N,) int64 in [0, V).
        chunk: rows whose logits are made at once, by default CHUNK.
    """
    return _LinearCrossEntropy.apply(rows, weight, targets, chunk or CHUNK, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int, grad_enabled: bool) -> Tensor:
        dtype = autocast_dtype(rows)
        exact = torch.promote_types(dtype, torch.float32)
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        d_rows = torch.empty_like(rows) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        total = rows.new_zeros((), dtype=exact)
        with torch.autocast(rows.device.type, enabled=False):
            lowered = weight.to(dtype)
            for begin in range(0, len(rows), chunk):
                part = slice(begin, begin + chunk)
                x, target = rows[part].to(dtype), targets[part, None]
                p = (x @ lowered.T).to(exact)  # the logits, in place their exponentials, then p − one-hot
                largest = p.amax(1, keepdim=True)
                chosen = p.gather(1, target) - largest
                denominator = p.sub_(largest).exp_().sum(1, keepdim=True)
                total += (denominator.log() - chosen).sum()
                if not any(wanted):
                    continue
                p.div_(denominator).scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
                p = p.to(dtype)
                if wanted[0]:
                    d_rows[part] = p @ lowered
                if wanted[1]:
                    _add_product(d_weight, p.T, x)
                del p
        ctx.save_for_backward(d_rows, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor):
        # In place, since the weight's gradient may be the largest tensor there is; autograd refuses a second backward.
        return *(None if grad is None else grad.mul_(d_total) for grad in ctx.saved_tensors), None, None, None


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b


def _liger(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same sum by liger-kernel's fused Triton kernel, which waits for the device once; not yet run on a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_LABEL, reduction="sum")(weight, rows, targets)
