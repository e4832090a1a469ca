"""Programmatic dependent launch (sm_90 and newer): a kernel may start while the one before it in the stream ends.

Every kernel first waits here, before it reads, writes or leaves: so when a launch has ended, all before it have.
The first launch of an operator is an ordinary one (`Sequence`): what comes before it in the stream is not ours.
"""

import triton
import triton.language as tl
from triton.language import target_info

from .launch import INTERPRETED

_WAITS = tl.constexpr(not INTERPRETED)


@triton.jit
def wait_for_previous_launch():
    """Until all that the launches before have written is visible; nothing at all after an ordinary launch."""
    if _WAITS and target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
