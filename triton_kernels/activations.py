"""The activations and their derivatives, in float32, for the epilogues of the GEMMs."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # not maximum(): a NaN is to stay one, as in PyTorch
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def derivative(saved, ACTIVATION: tl.constexpr):
    """act'(pre-activation). `saved` is the pre-activation; for relu its output serves as well."""
    if ACTIVATION == "relu":
        return tl.where(saved > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        return cdf + saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
    else:
        s = tl.sigmoid(saved)
        return s * (1.0 + saved * (1.0 - s))
