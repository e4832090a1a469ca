"""`llama-smop env` and `llama-smop doctor`: what is installed, what is right and how quick it is on this machine."""
