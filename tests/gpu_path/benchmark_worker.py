"""The benchmark's worker, whose products by TMA are described as those of the tests are (tensor_maps.py)."""

import sys

from benchmarks import worker
from tests.gpu_path import tensor_maps

if __name__ == "__main__":
    tensor_maps.pytest_configure()
    sys.exit(worker.main(int(sys.argv[1])))
