"""A page and an HTTP endpoint over one model: `llama-smop serve`."""
