"""Package layout: `triton_kernels/` stays a top-level folder and installs as `llama_smop.triton_kernels`.

A top-level import name `triton_kernels` belongs to other distributions already.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llama_smop", "llama_smop.*"], exclude=["llama_smop.triton_kernels"]), "llama_smop.triton_kernels"],
    package_dir={"llama_smop.triton_kernels": "triton_kernels"},
)
