"""Which of the sparse projectors in use a `SMoPProjector` is: the options beyond the paper's, and their checks."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

INPUT_NORMS = (None, "rms", "layer")
ROUTERS = ("linear", "mlp")
BALANCES = ("switch", "mse", None)
MERGES = (None, "utterance")
INPUT_NORM_EPS = {"rms": 1e-6, "layer": 1e-5}  # as Llama's RMSNorm and torch's LayerNorm have them


class SMoPForm(NamedTuple):
    """The options; what each means: `SMoPProjector`. The defaults are the paper's."""

    shared_experts: int = 0
    input_norm: str | None = None
    gated: bool = False
    normalize_weights: bool = True
    weight_scale: float = 1.0
    router: str = "linear"
    router_hidden: int = 512
    router_bias: bool = False
    router_jitter: float = 0.0
    balance: str | None = "switch"
    merge: str | None = None

    def check(self) -> None:
        """Raise ValueError, in one line, unless every option is one, and they go together."""
        for name, known in (("input_norm", INPUT_NORMS), ("router", ROUTERS), ("balance", BALANCES), ("merge", MERGES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("gated", "normalize_weights", "router_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, least in (("shared_experts", 0), ("router_hidden", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not _is_number(self.weight_scale) or self.weight_scale <= 0:
            raise ValueError(f"weight_scale must be a number above 0, got {self.weight_scale!r}")
        if not _is_number(self.router_jitter) or not 0 <= self.router_jitter < 1:
            raise ValueError(f"router_jitter must lie in [0, 1), got {self.router_jitter!r}")
        if self.merge:
            self._check_merge()

    def _check_merge(self) -> None:
        if self.balance == "switch":
            raise ValueError('merge="utterance" chooses no experts: balance must be "mse" or None')
        for name in ("shared_experts", "normalize_weights", "weight_scale"):
            if getattr(self, name) != getattr(PAPER, name):
                raise ValueError(f'merge="utterance" has no gate weights: leave {name} at {getattr(PAPER, name)!r}')

    def described(self) -> list[str]:
        """name=value of all that differs from the paper's."""
        return [f"{n}={v!r}" for n, v in self._asdict().items() if v != getattr(PAPER, n)]

    @classmethod
    def of(cls, settings: Any) -> "SMoPForm":
        """The options among the attributes of a configuration, or the entries of a mapping; the paper's where none."""
        known = settings if isinstance(settings, Mapping) else vars(settings)
        return cls(**{name: known[name] for name in cls._fields if name in known})

    def needs_logits(self, training: bool) -> bool:
        """Whether the router is more than the one product that `smop::route` computes."""
        noise = training and self.router_jitter > 0
        return self.router == "mlp" or self.router_bias or noise or self.merge is not None


PAPER = SMoPForm()


def _is_number(value) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
