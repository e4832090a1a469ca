"""Lets Triton's launcher describe boxes for TMA under smopcuda: `pytest -p tests.gpu_path.tensor_maps`.

smopcuda's driver hands `cuTensorMapEncodeTiled` on to the stand-in for the runtime. Where Triton has loaded that driver
for all libraries to see, it gets itself in the stand-in's place. This asks the stand-in's own library, for the same.
"""

import ctypes
from pathlib import Path

import triton
from triton.backends.nvidia import driver

OFFSET = 128  # of the tensor map in Triton's object, by the alignment that it declares
L2_PROMOTION = 3  # 256 bytes, as Triton asks


def pytest_configure() -> None:
    triton.runtime.driver.active.utils.fill_tma_descriptor = described


def described(address, swizzle, item_size, item_type, box, shape, strides, padding):
    """Triton's `fill_tma_descriptor`, of version 3.6."""
    rank = len(shape)
    dims = (ctypes.c_uint64 * rank)(*reversed(shape))
    steps = (ctypes.c_uint64 * rank)(*(item_size * step for step in reversed(strides[:-1])))
    boxes, ones = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
    found = driver.PyCUtensorMap()
    at = ctypes.c_void_p(id(found) + OFFSET)
    arguments = (
        at,
        item_type,
        rank,
        ctypes.c_void_p(address),
        dims,
        steps,
        boxes,
        ones,
        0,
        swizzle,
        L2_PROMOTION,
        padding,
    )
    if _stand_in().cuTensorMapEncodeTiled(*arguments):
        raise RuntimeError(f"no tensor map of {[*dims]}, steps {[*steps]}, box {[*boxes]}")
    return found


def _stand_in() -> ctypes.CDLL:
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
    (path,) = paths
    return ctypes.CDLL(path)
