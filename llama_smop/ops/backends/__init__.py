"""The implementations of `ops.backend.Backend`; Triton's is `llama_smop.triton_kernels.projection`."""
