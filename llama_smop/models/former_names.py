"""Names of weights in files of earlier versions, in which the projector's biases and norms had other names."""

from llama_smop.projector import FORMER_NAMES

_PROJECTOR = "multi_modal_projector"
# For transformers' `from_pretrained`: regular expression -> name.
KEY_MAPPING = {rf"^{_PROJECTOR}\.{former}$": f"{_PROJECTOR}.{name}" for former, name in FORMER_NAMES.items()}


def present_name(name: str) -> str:
    """The name that a weight of a model has now; names that did not change are returned as they are."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{FORMER_NAMES.get(leaf, leaf)}" if module == _PROJECTOR else name
