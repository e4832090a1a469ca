"""`replace_experts`: swap the mixtures of a finished model for the fast one, weights, state-dict keys and all.

A mixture is a router, `Linear` or `Linear, ReLU, Linear`, beside a `ModuleList` of MLPs: two layers with ReLU, GELU or
SiLU between them, or with a gate, and perhaps a LayerNorm at their end. There may be an expert more that all tokens
share, a norm of the input, convolutions before it, and neighbouring frames stacked into a token. It returns
`(output (..., O), router_logits (tokens, E))`, or the output alone. The authors' release of Llama-SMoP is of that
shape, and so are the mixtures of tiny-audio and of MOSA.

Whether a module of such a shape computes one of the functions that are here is not guessed but tried: both run on a few
random tokens, in eval and in training mode, and a module whose numbers differ is left alone.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from llama_smop.integrations import mixture_parts
from llama_smop.integrations.mixture_parts import ACTIVATIONS, Parts, numbers
from llama_smop.integrations.stacked_mixture import Settings, StackedMixture
from llama_smop.ops import dispatch

PROBE_TOKENS = 8
PROBE_TOLERANCE = 2e-3  # of the largest value
AUX_PROBES = 5  # one auxiliary loss each: the two weights must explain all of them

Result = tuple[Tensor, ...]


@dataclass
class Replacement:
    """What `replace_experts` found, by module name."""

    replaced: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)  # name -> why
    _sites: list[tuple[nn.Module, str, nn.Module, "StackedMixture"]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original modules back, with the weights as they are now."""
        for parent, name, original, mixture in self._sites:
            mixture.copy_into(original)
            setattr(parent, name, original)
        self._sites.clear()

    def __str__(self) -> str:
        lines = [f"{name or '(the module itself)'}: replaced" for name in self.replaced]
        return "\n".join(
            lines + [f"{name or '(the module itself)'}: left alone, {why}" for name, why in self.left_alone.items()]
        )


def replace_experts(
    module: nn.Module, *, dry_run: bool = False, backend: str = "auto", recompute: str | int = "none"
) -> Replacement:
    """Swap every mixture of a known shape inside `module` for a `StackedMixture` with the same weights.

    Do it before the optimizer is made: parameters become stacked tensors. State dicts keep their keys both ways.

    Args:
        dry_run: only report what would be replaced.
        backend, recompute: as in `llama_smop.functional.smop`.

    Returns:
        A `Replacement`: names replaced, names left alone and why; `undo()` puts the originals back.

    Raises:
        ValueError: `module` itself is a mixture: there is no parent to put the new one into.
    """
    dispatch.check_backend(backend)
    report, made = Replacement(), {}
    for name, found in list(module.named_modules(remove_duplicate=False)):
        parts = None if isinstance(found, StackedMixture) else mixture_parts.find(found)
        if parts is None:
            continue
        if isinstance(parts, str):
            report.left_alone[name] = parts
            continue
        if found is module:
            raise ValueError("module is itself a mixture: wrap it, or pass the module that contains it")
        if id(found) not in made:
            made[id(found)] = _fitting_mixture(found, parts, backend, recompute)
        mixture = made[id(found)]
        if isinstance(mixture, str):
            report.left_alone[name] = mixture
            continue
        report.replaced.append(name)
        if not dry_run:
            parent, _, child = name.rpartition(".")
            parent = module.get_submodule(parent)
            report._sites.append((parent, child, found, mixture))
            setattr(parent, child, mixture)
    return report


def _fitting_mixture(original: nn.Module, parts: Parts, backend: str, recompute: str | int) -> StackedMixture | str:
    """The stacked mixture that reproduces `original`, or why there is none."""
    weight = next(getattr(original, parts.experts).parameters())
    if weight.device.type == "meta":
        return _untried(original, parts, backend, recompute)
    # In low precision a near tie may be routed either way: such a mixture is tried as a float32 copy.
    D = mixture_parts.width(parts.expert, getattr(original, parts.experts)[0])
    trial = _copy(original) if weight.dtype in (torch.float32, torch.float64) else _copy(original).float()
    tried = next(getattr(trial, parts.experts).parameters())
    answers = [(tokens, _run(trial, tokens, training=False)) for tokens in _inputs(trial, parts, tried)]
    served = next(((tokens, result) for tokens, result in answers if not isinstance(result, str)), None)
    if served is None:
        return str(answers[0][1])
    tokens, expected = served
    candidate = StackedMixture(trial, parts, Settings(1, "relu"), backend, recompute)
    stacks = tokens.shape[-1] != D and not parts.front
    for settings in _settings(trial, parts, stacks, logits=len(expected) == 2):
        candidate.settings, candidate.top_k = settings, settings.top_k
        if _same(_run(candidate, tokens, training=False), expected):
            found = _as_in_training(candidate, trial, tokens)
            return found if isinstance(found, str) else StackedMixture(original, parts, found, backend, recompute)
    return "it computes another function than the weighted mean of its top-K experts"


def _untried(original: nn.Module, parts: Parts, backend: str, recompute: str | int) -> StackedMixture | str:
    """On the meta device there are no numbers to try: only the shape of the authors' release passes."""
    top_k, router, expert = getattr(original, "top_k", None), getattr(original, parts.router), parts.expert
    if not isinstance(top_k, int):
        return "its top_k is not known: it lies on the meta device and has no attribute top_k"
    further = parts.shared or parts.norm or parts.front or expert.gated or expert.activation is None
    if further or not isinstance(router, nn.Linear) or router.bias is not None:
        return "it lies on the meta device, where there are no numbers to try"
    assert expert.activation is not None
    return StackedMixture(original, parts, Settings(top_k, expert.activation), backend, recompute)


def _inputs(module: nn.Module, parts: Parts, like: Tensor) -> Iterator[Tensor]:
    """Random tokens (1, tokens, D); or frames, for convolutions or where a setting of the module divides D."""
    generator = torch.Generator().manual_seed(0)
    D = mixture_parts.width(parts.expert, getattr(module, parts.experts)[0])

    def random(frames: int, width: int) -> Tensor:
        return torch.randn(1, frames, width, generator=generator).to(like.device, like.dtype)

    if parts.front:
        first: Any = getattr(module, parts.front)[0]
        yield random(8 * PROBE_TOKENS, first.in_channels)
        return
    yield random(PROBE_TOKENS, D)
    for k in dict.fromkeys(numbers(module, int)):
        if 1 < k < D and D % k == 0:
            yield random(k * PROBE_TOKENS + k - 1, D // k)  # the last frames fill no token


def _settings(module: nn.Module, parts: Parts, stacks: bool, logits: bool) -> Iterator[Settings]:
    """Every way in which the parts may be put together, the usual ones first."""
    known, expert = getattr(module, "top_k", None), parts.expert
    E = len(getattr(module, parts.experts))
    top_ks = [known] if isinstance(known, int) and 1 <= known <= E else range(1, E + 1)
    scales = [1.0, *numbers(module, float, "scal")]
    activations = ACTIVATIONS if expert.activation is None else (expert.activation,)
    for scale, normalize, pads, last in product(scales, (True, False), {False, stacks}, {False, expert.gated}):
        for activation, top_k in product(activations, top_ks):
            yield Settings(top_k, activation, last, normalize, scale, 0.0, pads, logits)


def _as_in_training(candidate: StackedMixture, original: nn.Module, tokens: Tensor) -> Settings | str:
    """The candidate's settings with the noise and the auxiliary loss of training, or why they are not known."""
    settings = candidate.settings
    expected = _run(original, tokens, training=True)
    tried = {}
    for jitter in (0.0, *numbers(original, float, "jitter", "noise")):
        if jitter < 1:
            candidate.settings = settings._replace(jitter=jitter)
            tried[candidate.settings] = _off(_run(candidate, tokens, training=True), expected)
    candidate.settings = min(tried, key=lambda s: tried[s])  # a little noise changes little
    if tried[candidate.settings] > PROBE_TOLERANCE:
        return "it computes another function in training mode: dropout, or noise that is not known"
    if not callable(getattr(type(original), "get_aux_loss", None)):
        return candidate.settings
    for form in ("switch", "mse"):
        candidate.settings = candidate.settings._replace(aux=(form, 1.0, 1.0))
        losses, terms = [], []
        for probe in _probes(tokens):
            _run(original, probe, training=True)
            _run(candidate, probe, training=True)
            loss = _aux_loss(original)
            if loss is None or candidate._losses is None:
                return "its get_aux_loss takes arguments, or returns no number"
            losses.append(loss)
            terms.append(torch.stack(candidate._losses).detach().double().cpu())
        wanted, parts = torch.stack(losses).reshape(-1, 1), torch.stack(terms)
        weights = torch.linalg.lstsq(parts, wanted, driver="gelsd").solution
        off, spread = (parts @ weights - wanted).abs().max(), wanted.max() - wanted.min()
        if off <= PROBE_TOLERANCE * min(wanted.abs().max(), 10 * spread):
            return candidate.settings._replace(aux=(form, *weights.flatten().tolist()))
    return "its auxiliary loss is neither of the forms that are here, or weighted otherwise"


def _aux_loss(module: Any) -> Tensor | None:
    try:
        return torch.as_tensor(module.get_aux_loss()).detach().double().cpu().reshape(())
    except Exception:
        return None


def _probes(tokens: Tensor) -> list[Tensor]:
    """Tokens of the same shape, each time more of them alike, so that a router spreads them otherwise."""
    generator = torch.Generator().manual_seed(1)

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(tokens)

    return [like(*tokens.shape) + probe * like(1, 1, tokens.shape[2]) for probe in range(AUX_PROBES)]


def _copy(module: nn.Module) -> nn.Module:
    """`deepcopy`, also of a module that holds the loss of its last forward, with the graph behind it."""
    held = [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return deepcopy(module, {id(v): v.detach().clone() for v in held})


def _run(mixture: nn.Module, tokens: Tensor, training: bool) -> Result | str:
    """What `mixture` returns for tokens, noise drawn from a fixed seed; or why that is not what a mixture returns."""
    modes = [(m, m.training) for m in mixture.modules()]
    mixture.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(0)
            result = mixture(tokens)
    except Exception as error:
        return f"it cannot be called with hidden states alone ({type(error).__name__}: {error})"
    finally:
        for module, mode in modes:
            module.training = mode
    result = result if isinstance(result, tuple) else (result,)
    if not (len(result) in (1, 2) and all(isinstance(t, Tensor) for t in result)):
        return "it does not return its output, or (output, router_logits)"
    return result


def _same(ours: Result | str, theirs: Result | str) -> bool:
    """Equal but for rounding, TF32's included; another function is off by far more."""
    return _off(ours, theirs) <= PROBE_TOLERANCE


def _off(ours: Result | str, theirs: Result | str) -> float:
    """The largest difference, as a share of the largest value; infinite for results of another kind, and for NaN."""
    if isinstance(ours, str) or isinstance(theirs, str) or len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        off = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-6)
        worst = max(worst, off if off == off else math.inf)
    return worst
