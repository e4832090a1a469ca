"""`python -m benchmarks decoding`: tokens a second that `generate` writes on this CPU, by cache and what is compiled.

All ways continue the same prompts, which the towers and the projector have made, and must write the same tokens. They
are timed in turns. Compiling is what the first calls take beyond later ones; no code is kept from runs before.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import CompileConfig

from benchmarks import environment, results, say
from llama_smop.models.tiny import build_tiny

FOLDER = results.FOLDER / "decoding"
MODELS = {
    "the demo's": {"width": 128, "text_layers": 3},
    "wider": {"width": 1024, "text_layers": 3, "audio_layers": 1, "video_layers": 1},
}
FRAMES = (45, 40, 50)  # of clips, whose prompts differ in length
STATIC = {"cache_implementation": "static", "max_cache_len": 256}
DEFAULT, FIXED, COMPILED, STEP, WHOLE = WAYS = (
    "growing cache (the default)",
    "static cache",
    "static cache, `model.language_model.compile()`",
    "static cache, each step compiled by `generate`",
    "growing cache, `torch.compile(model.generate)`",
)


def run(path: Path | None = None, quick: bool = False, say: Callable[[str], None] = say) -> dict:
    """Measure every model and way and save; `path` defaults to the CPU's file under benchmarks/results/decoding/.

    Raises:
        ValueError: ways that write different tokens.
    """
    found = {"schema": results.SCHEMA, "environment": environment.describe(torch.device("cpu"))}
    path = path or FOLDER / f"{results.slug('cpu', found['environment'])}.json"
    found |= {"new_tokens": 8 if quick else 64, "rounds": 2 if quick else 9, "models": []}
    for name in ["the demo's"] if quick else MODELS:
        backend = "eager" if quick else "inductor"  # the former writes no code, and takes no time
        measured = _model(MODELS[name], found["new_tokens"], found["rounds"], backend)
        found["models"].append({"model": name, **MODELS[name], **measured})
        for way in measured["ways"]:
            say(f"{name}: {found['new_tokens'] / median(way['seconds']):.0f} tokens/s, {way['way']}")
        found["environment"]["load_average_after"] = environment.describe(torch.device("cpu"))["load_average"]
        results.save(found, path)
    say(f"saved {path}")
    return found


@torch.inference_mode()
def _model(sizes: dict, new: int, rounds: int, backend: str) -> dict:
    """Of a model: its language model's parameters; of each way the seconds of each round, and of compiling."""
    torch._dynamo.reset()
    calls, first, expected = {}, {}, None
    for way in WAYS:
        torch.manual_seed(0)
        model, processor = build_tiny(["bin", "blue", "now"], **sizes)
        prompts = [_prompt(model.eval(), processor, frames) for frames in FRAMES]
        if way == COMPILED:
            model.language_model.compile(backend=backend)
        settings = _settings(way, backend) | {"min_new_tokens": new, "max_new_tokens": new}
        generate = torch.compile(model.generate, backend=backend) if way == WHOLE else model.generate

        def call(prompt: dict, generate=generate, settings=settings) -> tuple[Tensor, float]:
            begin = time.perf_counter()
            ids = generate(**prompt, **settings)
            return ids, time.perf_counter() - begin

        with torch._inductor.config.patch(force_disable_caches=True):
            tokens, seconds = zip(*map(call, prompts), strict=True)
        expected = expected or tokens
        if not all(map(torch.equal, tokens, expected)):
            raise ValueError(f"{way}: other tokens than with the {DEFAULT.split(' (')[0]}")
        calls[way], first[way] = (lambda call=call, prompt=prompts[0]: call(prompt)[1]), sum(seconds)
    timed = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            timed[way].append(calls[way]())
    compiling = {way: max(0.0, first[way] - len(FRAMES) * median(timed[way])) for way in (COMPILED, STEP, WHOLE)}
    return {
        "parameters": sum(p.numel() for p in model.language_model.parameters()),
        "ways": [{"way": way, "seconds": timed[way], "compiling_s": compiling.get(way)} for way in WAYS],
    }


def _settings(way: str, backend: str) -> dict:
    """Of `generate`."""
    if way == STEP:
        compiled = CompileConfig(fullgraph=True, mode="default", backend=backend)
        compiled._compile_all_devices = True  # transformers does it by itself on a GPU alone
        return STATIC | {"compile_config": compiled}
    return {} if way in (DEFAULT, WHOLE) else STATIC


def _prompt(model, processor, frames: int) -> dict:
    """Embeddings with the speech of a made-up clip in them, and their mask."""
    generator = torch.Generator().manual_seed(frames)
    audio = torch.randn(frames * 640, generator=generator) * 0.3
    inputs = processor(audio=[audio], video=[torch.randn(frames, 1, 88, 88, generator=generator)])
    speech = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    embeds = model.place_speech(inputs["input_ids"], model.get_speech_features(**speech))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
