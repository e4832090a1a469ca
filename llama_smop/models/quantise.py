"""The language model in 8 or 4 bits; towers, projector and LoRA stay in floating point."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from llama_smop.system.extras import remedy

# Expressions for names of modules. The head is often tied to the embeddings, which are not quantised.
KEPT = ("audio_tower", "video_tower", "multi_modal_projector", "ctc_heads", ".*lm_head", r".*\.lora_\w+")
GROUP = 32  # neighbouring weights with one scale, in 4 bits with torchao


def language_model_in(bits: int, library: str | None = None) -> QuantizationConfigMixin:
    """`from_pretrained(…, quantization_config=language_model_in(8))`: weights are rounded, products are not.

    library: "bitsandbytes" or "torchao"; by default the first where there is a GPU and it is installed. torchao keeps 4
        bits in a byte each, so that they save no more memory than 8.

    Raises:
        ValueError: neither 8 nor 4 bits, or an unknown library.
        ImportError: the library is not installed.
    """
    if bits not in (8, 4):
        raise ValueError(f"a language model can be loaded in 8 or 4 bits, got {bits!r:.60}")
    if library is None:
        library = "bitsandbytes" if torch.cuda.is_available() and find_spec("bitsandbytes") else "torchao"
    if library not in ("bitsandbytes", "torchao"):
        raise ValueError(f"quantisation is that of bitsandbytes or torchao, got {library!r:.60}")
    if find_spec(library) is None:
        raise ImportError(remedy(library), name=library)
    if library == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=list(KEPT))
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else four, modules_to_not_convert=list(KEPT))
