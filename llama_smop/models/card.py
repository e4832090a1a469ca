"""The model card of a model folder, README.md: what the files beside it say, and nothing that they do not.

Metadata follow the hub's convention; word error rates also stand in its `model-index`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import initialization as init
from yaml import YAMLError

from llama_smop.models import seal
from llama_smop.models.card_records import CONVERSION, EVALUATION, add_results, read_note, read_results, read_training
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.hub import is_hub_name
from llama_smop.models.rates import rate_text
from llama_smop.system import files

PAPER = "2505.14336"
TASKS = {"audio": "automatic-speech-recognition", "video": "video-text-to-text"}  # the hub has none for lips
PARTS = {
    "audio_tower": "audio encoder",
    "video_tower": "lip encoder",
    "multi_modal_projector": "projector",
    "language_model": "language model",
    "ctc_heads": "CTC heads, for training",
}


@dataclass(frozen=True)
class Metadata:
    """What no file of a folder says but its card: given by people, kept when the card is written again."""

    name: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    base_models: Sequence[str] = ()
    tags: Sequence[str] = ()


def write_card(kind: Any, folder: Path, metadata: Metadata | None = None) -> Path | None:
    """Write the card of a model folder; None where somebody edited the card, which then stays.

    kind: the model's class. metadata: in place of what the card says that is there.

    Raises:
        ValueError: a configuration that cannot be read,.
    """
    target = folder / seal.CARD
    if seal.is_edited(target):
        return None
    return files.write_text(target, card_text(kind, folder, metadata or read_metadata(folder)))


def read_metadata(folder: Path) -> Metadata:
    """What a folder's card says already, edited or not; nothing where there is no card that can be read."""
    try:
        data = ModelCard((folder / seal.CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, YAMLError):
        return Metadata()
    return Metadata(
        name=data.model_name,
        license=data.license,
        datasets=_several(data.datasets),
        languages=_several(data.language),
        base_models=_several(data.base_model),
        tags=_several(data.tags),
    )


def inherited(folder: Path) -> Metadata:
    """The metadata of a model that is made of the one in `folder`: its own, but for the name."""
    told, sources = read_metadata(folder), LlamaSmopConfig.from_pretrained(folder).sources.values()
    bases = dict.fromkeys([*told.base_models, *(source for source in sources if is_hub_name(source))])
    return replace(told, name=None, base_models=list(bases))


def rewrite_card(kind: Any, folder: str | Path, given: Mapping, results: Sequence[tuple[Path, Any]] = ()) -> Path:
    """Write the card of a model folder again, with `given` (fields of `Metadata`) in place of what it says, and with
    results, (file, content) of `llama-smop evaluate --json` each.

    Raises:
        ValueError: no model there, a card that somebody edited, results of another model, or a field that is no name of
            the hub.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model here (config.json is missing); give the folder a training run wrote")
    if seal.is_edited(folder / seal.CARD):
        raise ValueError(f"{folder / seal.CARD}: was edited, so it stays as it is; move it away to have one written")
    for field, value in given.items():
        values = [value] if isinstance(value, str) else value
        odd = [v for v in values if field != "name" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", v)]
        if odd:
            raise ValueError(f"the {field} of a model card are names that the hub knows, got {odd[0]!r:.60}")
    metadata = replace(read_metadata(folder), **given)
    for file, records in results:
        add_results(folder, records, file)
    write_card(kind, folder, metadata)
    seal.renew(folder, [seal.CARD, EVALUATION])
    return folder / seal.CARD


def card_text(kind: Any, folder: Path, metadata: Metadata) -> str:
    """The card's text with its mark (`seal.mark_card`); arguments and errors as in `write_card`."""
    config = LlamaSmopConfig.from_pretrained(folder)
    training, rows = read_training(folder), read_results(folder)
    conversion = read_note(folder / CONVERSION)
    named = metadata.name or training.get("name") or folder.name
    bases = [*config.sources.values(), *(v for v in (conversion.get("language_model"),) if isinstance(v, str))]
    bases = list(dict.fromkeys([*metadata.base_models, *(base for base in bases if is_hub_name(base))]))
    metadata = replace(metadata, name=_cell(named), base_models=bases)
    tags = [*(["lip-reading"] if "video" in config.modalities else []), "llama-smop", f"arxiv:{PAPER}"]
    data = ModelCardData(
        pipeline_tag=TASKS[config.modalities[0]],
        library_name="llama-smop",
        base_model=bases or None,
        license=metadata.license,
        datasets=list(metadata.datasets) or None,
        language=list(metadata.languages) or None,
        metrics=["wer"] if rows else None,
        model_name=metadata.name,
        eval_results=[_eval_result(row, TASKS[config.modalities[0]]) for row in rows] or None,
        tags=list(dict.fromkeys([*tags, *metadata.tags])),
    )
    parts = [
        _head(config, metadata.name),
        _model(kind, config, trained=bool(training)),
        _training(training, conversion),
        _results(rows),
    ]
    return seal.mark_card(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts))))


def _head(config: LlamaSmopConfig, name: str) -> str:
    takes = " and ".join({"audio": "speech", "video": "lip movements"}[m] for m in config.modalities)
    alone = ", together or one of them alone" if len(config.modalities) == 2 else ""
    return f"""# {name}

A Llama-SMoP ([Cappellazzo et al., Interspeech 2025](https://arxiv.org/abs/{PAPER})): it transcribes {takes}{alone}.

    llama-smop transcribe clip.mp4 --model {name}

```python
from llama_smop import LlamaSmopForConditionalGeneration, LlamaSmopProcessor

model = LlamaSmopForConditionalGeneration.from_pretrained("{name}")
processor = LlamaSmopProcessor.from_pretrained("{name}")
```

`{name}` is the folder with this card's files."""


def _model(kind: Any, config: LlamaSmopConfig, trained: bool) -> str:
    counts, active = parameter_counts(kind, config)
    word = "trained" if trained else "trainable"
    lines = ["## Model", "", f"| part | what | parameters | {word} |", "|---|---|---:|---:|"]
    for part, (number, learns) in counts.items():
        lines.append(f"| {PARTS[part]} | {_part(config, part)} | {number:,} | {learns:,} |")
    whole, learns = (sum(values) for values in zip(*counts.values(), strict=True))
    lines += [f"| all | | {whole:,} | {learns:,} |", ""]
    if active is not None:
        others = " and the CTC heads" if "ctc_heads" in counts else ""
        others = f", the projectors of other rates{others}" if config.separate_projectors else others
        lines.append(f"Active for a token: {active:,} parameters, all but the experts that it does not pass{others}.")
    if config.rates is not None:
        rates = " and ".join(map(rate_text, config.known_rates))
        lines += ["", f"Compression rates (frames of audio, of video in a token; the first is the default): {rates}."]
    elsewhere = [f"the {PARTS[part]} from `{_origin(source)}`" for part, source in config.sources.items()]
    if elsewhere:
        lines += ["", f"Not in these files, and fetched when the model is loaded: {', '.join(elsewhere)}."]
    return "\n".join(lines)


def parameter_counts(kind: Any, config: LlamaSmopConfig) -> tuple[dict[str, tuple[int, int]], int | None]:
    """{part: (all, trainable)} parameters, and those at work for one token; None where the language model's own
    experts are not counted here. Shared tensors count once."""
    with torch.device("meta"), init.no_init_weights():
        model = kind(config)
    model.tie_weights()  # which comes with the initialisation
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = counts[name.partition(".")[0]]
        part[0] += parameter.numel()
        part[1] += parameter.numel() if parameter.requires_grad else 0
    counts = {part: (number, learns) for part, (number, learns) in counts.items() if number}
    if getattr(config.text_config, "num_experts_per_tok", None):
        return counts, None
    idle = counts.get("ctc_heads", (0, 0))[0]
    for projector in model.projectors[1:]:  # a token passes the projector of its rate
        idle += sum(parameter.numel() for parameter in projector.parameters())
    for name, parameter in model.projector_at().named_parameters():
        stacked = parameter.shape[0]  # experts, routers or modalities
        if name.startswith(("gate_", "router_")) or config.projector_config.kind == "dense":
            used = 1
        elif name.startswith("input_") or config.projector_config.merge:
            used = stacked
        else:
            used = config.projector_config.top_k + config.projector_config.shared_experts
        idle += parameter.numel() // stacked * (stacked - used)
    return counts, sum(number for number, _ in counts.values()) - idle


def _mixture(config: LlamaSmopConfig) -> str:
    projector = config.projector_config
    experts = f"{projector.num_experts} experts, top {projector.top_k}"
    return ", ".join(["sparse mixture", config.projector_sharing, experts, *projector.form.described()])


def _part(config: LlamaSmopConfig, part: str) -> str:
    projector = config.projector_config
    lora = config.lora.get(part)
    says = {
        "audio_tower": lambda: f"Whisper, {_size(config.audio_config.encoder_layers, config.audio_config.d_model)}",
        "video_tower": lambda: (
            f"AV-HuBERT, {_size(config.video_config.num_hidden_layers, config.video_config.hidden_size)}"
        ),
        "multi_modal_projector": lambda: (
            (_mixture(config) if projector.kind == "smop" else "dense, one for each modality")
            + (", one for each rate" if config.separate_projectors else "")
        ),
        "language_model": lambda: (
            f"{_cell(config.text_config.model_type)}, "
            + _size(config.text_config.num_hidden_layers, config.text_config.hidden_size)
        ),
        "ctc_heads": lambda: "linear",
    }[part]()
    return says + (f", LoRA of rank {lora['r']}" if lora else "")


def _size(layers: int, width: int) -> str:
    return f"{layers} layers, {width} wide"


def _training(training: dict, conversion: dict) -> str:
    lines = ["## Training", ""]
    facts = {k: v for k, v in training.items() if k not in ("name", "model_sha256") and v not in (None, "", [])}
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {_cell(k).replace('_', ' ')} | {_cell(v)} |" for k, v in facts.items())]
    elif isinstance(conversion.get("source"), str):
        lines.append(f"Converted from `{_origin(conversion['source'])}`; its training is not recorded in these files.")
    else:
        lines.append("Not recorded in these files.")
    return "\n".join(lines)


def _results(rows: Sequence[dict]) -> str:
    if not rows:
        return "## Results\n\nNone are recorded in these files."
    several = any(row["rate"] is not None for row in rows)
    lines = ["## Results", "", "Word error rates, measured with `llama-smop evaluate`.", ""]
    lines += [
        f"| corpus | labels | input |{' rate |' * several} noise | beams | clips | words | WER, % |",
        "|---" * (4 + several) + "|---:" * 4 + "|",
    ]
    for row in rows:
        rate = [row["rate"] or ""] * several
        cells = (row["corpus"], row["labels"], row["modality"], *rate, _noise(row), row["beams"], row["clips"])
        cells = (*cells, row["words"])
        lines.append(f"| {' | '.join(map(_cell, cells))} | {100 * row['wer']:.2f} |")
    return "\n".join(lines)


def _eval_result(row: dict, task: str) -> EvalResult:
    condition = f"{row['modality']}, {_noise(row)}" + (f", rate {row['rate']}" if row["rate"] else "")
    return EvalResult(
        task_type=task,
        dataset_type=_cell(row["corpus"]),
        dataset_name=f"{_cell(row['corpus'])}, {condition}",
        dataset_config=condition,
        dataset_split=_cell(row["labels"]),
        metric_type="wer",
        metric_name="WER",
        metric_value=round(100 * row["wer"], 2),
    )


def _origin(source: str) -> str:
    """A hub name, or the last part of a path: a public card names no folders of somebody's machine."""
    return _cell(source if is_hub_name(source) else Path(source).name).replace("`", "'")


def _noise(row: dict) -> str:
    return "clean" if row["snr"] is None else f"{_cell(row['noise'])} at {row['snr']:g} dB"


def _several(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _cell(value: Any) -> str:
    """One line without what would end a table's cell or open a tag."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")")[:200]
