"""Makes transformers' Auto classes and pipelines know the model, without importing transformers.

transformers has no entry points, and `import llama_smop` stays light. So this watches for the modules below: when the
user imports one of them, before or after this package, the module of ours that registers there is imported too.
"""

import logging
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

logger = logging.getLogger(__name__)

# Of transformers, and of this package what registers itself there when it is imported.
REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "llama_smop.models.configuration_llama_smop",
    "transformers.models.auto.modeling_auto": "llama_smop.models.modeling_llama_smop",
    "transformers.models.auto.processing_auto": "llama_smop.models.processing_llama_smop",
    "transformers.pipelines": "llama_smop.transcription.pipeline",
}
PACKAGES = ("transformers", "llama_smop")


class _Watcher(MetaPathFinder):
    """Finds nothing itself. It waits for the end of the outermost import, so that no module meets a half-made one."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.sought: set[str] = set()
        self.due = {name for name in REGISTERED_BY if name in sys.modules}

    def find_spec(self, name, path, target=None):
        done = all(ours in sys.modules for ours in REGISTERED_BY.values())
        if done or name.partition(".")[0] not in PACKAGES or name in self.sought:
            return None
        self.sought.add(name)  # another finder may ask all finders, too
        try:
            finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        finally:
            self.sought.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _WatchedLoader(self, spec.loader)
        return spec

    def register(self) -> None:
        while self.due and not self.running:
            name = self.due.pop()
            try:
                import_module(REGISTERED_BY[name])
            except ImportError as error:  # without the extra [model], or with an older transformers
                logger.info("%s does not know llama_smop: %s", name, error)


class _WatchedLoader:
    """Another loader, which tells the watcher of beginning and end."""

    def __init__(self, watcher: _Watcher, loader):
        self._watcher, self._loader = watcher, loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        name = module.__name__
        module.__loader__ = module.__spec__.loader = self._loader
        self._watcher.running.add(name)
        try:
            self._loader.exec_module(module)
        finally:
            self._watcher.running.discard(name)
        if name in REGISTERED_BY:
            self._watcher.due.add(name)
        self._watcher.register()


def watch() -> None:
    """Register now with what is imported already, later with the rest."""
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    watcher.register()
