"""The computations behind the operators: PyTorch, Triton and the CUDA extension, all with the same functions."""
