"""Convert the authors' checkpoints (Llama-SMoP, Llama-AVSR): one flat state dict in, one model folder out."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, WhisperConfig, WhisperFeatureExtractor
from transformers.initialization import no_init_weights

from llama_smop.convert.avhubert import ACCOUNT
from llama_smop.models import seal
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig, ProjectorConfig
from llama_smop.models.formats.fairseq import AVHUBERT_RULES, avhubert_config, model_settings
from llama_smop.models.formats.key_map import KeyReport, Rule, load_rules, match_keys, rename
from llama_smop.models.formats.safe_load import load_checkpoint, state_dict_of
from llama_smop.models.former_names import present_name
from llama_smop.models.hub import fetch
from llama_smop.models.model_folder import describe
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.tokenizer import add_special_tokens, token_ids
from llama_smop.models.units import STREAMS
from llama_smop.system import files

PROJECTOR = "multi_modal_projector"
_LORA = r"llm\.(model\.layers\.\d+\.self_attn)\.lora_"
# The published names. JEDR's and DEDR's are not public: name them in a key map (`load_rules`), for example
#   {pattern: 'video_proj\.experts\.(\d+)\.0\.weight', target: 'multi_modal_projector.w1[\1+4]'}
AUTHORS_RULES = (
    Rule(r"audio_encoder\.(.+)", r"audio_tower.\1"),
    *(
        Rule(r"video_encoder\." + rule.pattern.replace("|", r"|video_encoder\."), None, rule.why)
        if rule.target is None
        else Rule(r"video_encoder\." + rule.pattern, f"video_tower.{rule.target}")
        for rule in AVHUBERT_RULES
    ),
    Rule(r"audiovisual_proj\.gate\.weight", f"{PROJECTOR}.gate_weight[0]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.0\.weight", PROJECTOR + r".w1[\1]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.0\.bias", PROJECTOR + r".bias1[\1]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.2\.weight", PROJECTOR + r".w2[\1]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.2\.bias", PROJECTOR + r".bias2[\1]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.3\.weight", PROJECTOR + r".layernorm_weight[\1]"),
    Rule(r"audiovisual_proj\.experts\.(\d+)\.3\.bias", PROJECTOR + r".layernorm_bias[\1]"),
    Rule(_LORA + r"down_Q\.weight", r"language_model.\1.q_proj.lora_A.default.weight"),
    Rule(_LORA + r"up_Q\.weight", r"language_model.\1.q_proj.lora_B.default.weight"),
    Rule(_LORA + r"down_V\.weight", r"language_model.\1.v_proj.lora_A.default.weight"),
    Rule(_LORA + r"up_V\.weight", r"language_model.\1.v_proj.lora_B.default.weight"),
    Rule(r"llm\..*rotary_emb\.inv_freq", None, "computed from the configuration"),
    Rule(r"llm\.(.+)", r"language_model.\1"),
)
# All published runs have alpha / rank = 4/32 or 8/64; AV-HuBERT's LoRA has scale 2.
LANGUAGE_MODEL_LORA_SCALE, VIDEO_TOWER_LORA_SCALE = 0.125, 2.0


def dense_rules(modalities: Sequence[str]) -> list[Rule]:
    """Llama-AVSR's `audio_proj.{0,2,3}` and `video_proj.{0,2,3}`; a modality alone is row 0."""
    layers = (("0", "w1", "bias1"), ("2", "w2", "bias2"), ("3", "layernorm_weight", "layernorm_bias"))
    return [
        Rule(rf"{m}_proj\.{layer}\.{leaf}", f"{PROJECTOR}.{name}[{row}]")
        for row, m in enumerate(modalities)
        for layer, *names in layers
        for leaf, name in zip(("weight", "bias"), names, strict=True)
    ]


def convert_authors(
    source: str | Path,
    to: str | Path,
    *,
    language_model: str,
    audio_tower: str | None = None,
    video_tower: str | Path | None = None,
    rate_audio: int = 4,
    rate_video: int = 2,
    compression: str = "pool",
    top_k: int = 2,
    lora_scale: float = LANGUAGE_MODEL_LORA_SCALE,
    key_map: str | Path | None = None,
    partial: bool = False,
    backend: str = "auto",
) -> KeyReport:
    """Convert a Llama-SMoP or Llama-AVSR state dict to a folder that `from_pretrained` reads, complete with processor.

    Args:
        source: the authors' file, flat or a Lightning .ckpt.
        to: the folder to make; also gets `conversion.json`, the account of every key.
        language_model: name or folder of the base model: its config and tokenizer are read, its weights are not.
        audio_tower: name or folder of the Whisper model, for its config and feature extractor.
        video_tower: the AV-HuBERT .pt that training started from, for its settings; without it they are Large's.
        rate_audio, rate_video, compression, top_k: not in the file; the defaults are the published ones.
        lora_scale: the authors' alpha / rank.
        key_map: YAML rules that go before the built-in ones (`llama_smop.models.formats.key_map.load_rules`).
        partial: accept missing and unexpected keys.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`; keys or sizes that do not fit, a width that differs
            between tower and projector, a tokenizer that does not fit the embeddings.
        OSError: `to` cannot be written (`seal.check_target`).
    """
    if not 0 < lora_scale < math.inf:
        raise ValueError(f"the scale of LoRA (--lora-scale) is a number above 0, got {lora_scale}")
    state = state_dict_of(load_checkpoint(source), source)
    modalities = [m for m in STREAMS if any(k.startswith(f"{m}_encoder.") for k in state)]
    if not modalities:
        raise ValueError(
            f"{source}: holds neither audio_encoder nor video_encoder: not a Llama-SMoP or Llama-AVSR file"
        )
    rules = [*(_rules_of(key_map) if key_map else ()), *dense_rules(modalities), *AUTHORS_RULES]
    parts = {}
    if "audio" in modalities:
        if audio_tower is None:
            raise ValueError(f"{source}: has an audio encoder; say which Whisper it is (--audio-tower)")
        parts["audio_config"] = fetch(WhisperConfig, audio_tower)
    if "video" in modalities:
        inner = {k.removeprefix("video_encoder."): v for k, v in state.items() if k.startswith("video_encoder.")}
        settings = model_settings(load_checkpoint(video_tower), video_tower) if video_tower else {}
        parts["video_config"] = avhubert_config(inner, settings, source=source)
    tokenizer = fetch(AutoTokenizer, language_model)
    add_special_tokens(tokenizer)
    ids = token_ids(tokenizer)
    text_config = _text_config(state, language_model, len(tokenizer), ids, source)
    config = LlamaSmopConfig(
        **parts,
        text_config=text_config,
        projector_config=_projector_config(state, rules, top_k, backend, source),
        modalities=modalities,
        rate_audio=rate_audio,
        rate_video=rate_video,
        compression=compression,
        **ids,
        lora=_lora(state, lora_scale),
        dtype=state["llm.model.embed_tokens.weight"].dtype,
    )
    _check_widths(config, state, rules, source)
    with no_init_weights():
        model = LlamaSmopForConditionalGeneration(config)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    tied = {f"language_model.{k}" for k in ("lm_head.weight",)} if config.tie_word_embeddings else ()
    tensors, report = rename(state, rules, expected, optional=tied, pad_columns=(f"{PROJECTOR}.w1",))
    report.check(source, partial)
    model = model.to(config.dtype)
    model.load_state_dict(tensors, strict=False)
    feature_extractor = fetch(WhisperFeatureExtractor, audio_tower) if audio_tower else WhisperFeatureExtractor()
    account = {"source": str(source), "language_model": str(language_model), "keys": report.to_dict()}

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        LlamaSmopProcessor.for_config(config, feature_extractor, tokenizer).save_pretrained(folder)
        files.write_json(folder / ACCOUNT, account)
        describe(LlamaSmopForConditionalGeneration, folder, Path(to).name)

    seal.write_sealed(to, write)
    return report


def _rules_of(key_map: str | Path) -> list[Rule]:
    """A user's rules; their targets may have the names of earlier versions."""
    rules = []
    for rule in load_rules(key_map):
        name, bracket, row = (rule.target or "").partition("[")
        rules.append(replace(rule, target=rule.target and f"{present_name(name)}{bracket}{row}"))
    return rules


def _projector_config(state, rules, top_k: int, backend: str, source) -> ProjectorConfig:
    """Kind, sharing, experts and hidden width, as the keys and shapes show them."""
    rows: dict[str, dict[int, Tensor]] = {}
    for key, (_, place) in match_keys(state, rules).items():
        if place and place[0].startswith(f"{PROJECTOR}.") and place[1] is not None:
            rows.setdefault(place[0].removeprefix(f"{PROJECTOR}."), {})[place[1]] = state[key]
    if "w1" not in rows:
        raise ValueError(f"{source}: no projector under a known name; name its keys in a key map (--key-map)")
    common = {
        "hidden_features": next(iter(rows["w1"].values())).shape[0],
        "layer_norm": "layernorm_weight" in rows,
        "backend": backend,
    }
    if "gate_weight" not in rows:
        return ProjectorConfig(kind="dense", num_experts=1, top_k=1, **common)
    routers, experts = 1 + max(rows["gate_weight"]), 1 + max(rows["w1"])
    num_experts = rows["gate_weight"][0].shape[0]
    sharing = {(1, num_experts): "JEJR", (2, num_experts): "JEDR", (2, 2 * num_experts): "DEDR"}.get((routers, experts))
    if sharing is None:
        raise ValueError(
            f"{source}: {routers} routers over {num_experts} experts with {experts} experts in all is none of JEJR, "
            "JEDR and DEDR; check the key map"
        )
    return ProjectorConfig(num_experts=num_experts, top_k=min(top_k, num_experts), sharing=sharing, **common)


def _check_widths(config: LlamaSmopConfig, state, rules, source) -> None:
    widths = config.token_features
    for key, (_, place) in match_keys(state, rules).items():
        if place and place[0] == f"{PROJECTOR}.w1" and state[key].shape[1] not in widths.values():
            raise ValueError(
                f"{source}: the projector takes tokens of width {state[key].shape[1]} ({key}), the towers make "
                f"{widths} with {config.compression!r} at rates {config.rate_audio} and {config.rate_video}; give the "
                "rates and the compression it was trained with"
            )


def _text_config(state, language_model: str, tokens: int, ids: dict[str, int], source):
    config = fetch(AutoConfig, language_model)
    embeddings = state.get("llm.model.embed_tokens.weight")
    if embeddings is None:
        raise ValueError(f"{source}: has no llm.model.embed_tokens.weight, so the special tokens' embeddings are lost")
    if tuple(embeddings.shape) != (tokens, config.hidden_size):
        raise ValueError(
            f"{source}: embeddings are {tuple(embeddings.shape)}, but {language_model} with the special tokens needs "
            f"{(tokens, config.hidden_size)}; name the base model it was trained from"
        )
    config.vocab_size, config.pad_token_id = tokens, ids["pad_token_id"]
    return config


def _lora(state, scale: float) -> dict:
    result = {}
    for part, prefix, factor in (
        ("language_model", "llm.", scale),
        ("video_tower", "video_encoder.", VIDEO_TOWER_LORA_SCALE),
    ):
        ranks = {v.shape[0] for k, v in state.items() if k.startswith(prefix) and k.endswith("lora_down_Q.weight")}
        if ranks:
            r = ranks.pop()
            result[part] = {"r": r, "alpha": factor * r}
    return result
