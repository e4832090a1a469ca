"""Whisper out of a CTranslate2 `model.bin`, as transformers' model: real weights for the tests.

The file is little-endian: version, name, revision and number of the variables, then each one's name, shape, type, size
and bytes (https://github.com/OpenNMT/CTranslate2, `Model::load`). A string is its length, NUL included, and its bytes.
"""

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

SIDES = ("encoder", "decoder")
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
NORM = {"gamma": "weight", "beta": "bias"}
OUTSIDE_LAYERS = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/layer_norm": "decoder.layer_norm",
}
# linear_0 holds several projections one after the other
ATTENTION = {
    "self_attention": ("self_attn", ("q_proj", "k_proj", "v_proj"), ("out_proj",)),
    "attention": ("encoder_attn", ("q_proj",), ("k_proj", "v_proj"), ("out_proj",)),
}


def read_variables(path: Path) -> dict[str, Tensor]:
    """Every variable of a model.bin, float32 where it is a float."""
    content = memoryview(path.read_bytes())
    position = 0

    def number(kind: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{kind}", content, position)
        position += struct.calcsize(kind)
        return value

    def string() -> str:
        nonlocal position
        length = number("H")
        position += length
        return bytes(content[position - length : position - 1]).decode()

    assert number("I") >= 4, "an older file gives the size of an item in place of its type"
    assert string() == "WhisperSpec"
    number("I")
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = DTYPES[number("B")]
        size = number("I")
        array = np.frombuffer(content[position : position + size], dtype).reshape(shape)
        position += size
        variables[name] = torch.from_numpy(array.astype(np.float32 if dtype == np.float16 else dtype))
    return variables


def whisper(path: Path) -> WhisperForConditionalGeneration:
    """Whisper-tiny.en of a model.bin, sizes read from its tensors."""
    variables = read_variables(path)
    state = {}
    for name, value in variables.items():
        if value.dim():
            state |= {f"model.{key}": part for key, part in _renamed(name, value)}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    vocabulary, width = state["proj_out.weight"].shape
    layers = {
        s: sum(n.startswith(f"{s}/layer_") and n.endswith("/ffn/linear_0/bias") for n in variables) for s in SIDES
    }
    heads = {side: int(variables[f"{side}/num_heads"]) for side in layers}
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        **{f"{side}_layers": count for side, count in layers.items()},
        **{f"{side}_attention_heads": count for side, count in heads.items()},
        **{f"{side}_ffn_dim": len(variables[f"{side}/layer_0/ffn/linear_0/bias"]) for side in layers},
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(state)
    return model


def _renamed(name: str, value: Tensor):
    """(transformers' key, tensor) pairs of one variable."""
    in_layer = re.match(r"(encoder|decoder)/layer_(\d+)/(.*)", name)
    if in_layer is None:
        head, _, kind = name.rpartition("/")
        if head in OUTSIDE_LAYERS:
            yield f"{OUTSIDE_LAYERS[head]}.{NORM.get(kind, kind)}", value
        else:
            yield OUTSIDE_LAYERS[name], value
        return
    side, layer, inside = in_layer.groups()
    block, *rest = inside.split("/")
    prefix, kind = f"{side}.layers.{layer}", NORM.get(rest[-1], rest[-1])
    if block == "ffn":
        part = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[rest[0]]
        yield f"{prefix}.{part}.{kind}", value
    elif rest[0] == "layer_norm":
        yield f"{prefix}.{ATTENTION[block][0]}_layer_norm.{kind}", value
    else:
        attention, *linears = ATTENTION[block]
        parts = linears[int(rest[0].removeprefix("linear_"))]
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            if (part, kind) != ("k_proj", "bias"):  # Whisper's keys have none; it is zero here
                yield f"{prefix}.{attention}.{part}.{kind}", piece.contiguous()
