"""`python -m llama_smop.cli`, for torchrun."""

from llama_smop.cli import main

main()
