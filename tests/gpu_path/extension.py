"""Imported at the start of every Python of .venv-cuda that is given LLAMA_SMOP_GPU_PATH_EXTENSION, the folder of the
extension built for smopcuda: `llama_smop._C` is that one. The one that is installed, if any, is left alone."""

import importlib.abc
import importlib.machinery
import os
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "llama_smop._C":
            return None
        return importlib.machinery.PathFinder.find_spec(name, [os.environ["LLAMA_SMOP_GPU_PATH_EXTENSION"]])


sys.meta_path.insert(0, Finder())
