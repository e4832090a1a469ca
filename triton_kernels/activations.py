"""The activations and their derivatives, in float32, for the epilogues of the GEMMs; names of the gated ones."""

import triton
import triton.language as tl

GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}  # of gated experts -> what the gate goes through


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN stays one, as in PyTorch
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def activation_gradient(grad, saved, ACTIVATION: tl.constexpr):
    """grad · act'(pre-activation). `saved` is the pre-activation; for relu its output serves as well."""
    if ACTIVATION == "relu":
        # not a product with 0 or 1: an infinite gradient is to vanish where the unit was off
        return tl.where(saved > 0.0, grad, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        return grad * (cdf + saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved))
    else:
        s = tl.sigmoid(saved)
        return grad * s * (1.0 + saved * (1.0 - s))
