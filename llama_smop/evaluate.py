"""Word error rate of a model on a label file, by modality and signal-to-noise ratio."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llama_smop.data.batching import FrameBatchSampler
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.data.noise import Babble, Noise, NoiseFile
from llama_smop.models.decoding import transcribe_batch
from llama_smop.score import word_errors

MODALITIES = ("audio", "video", "audiovisual")


@dataclass(frozen=True)
class Row:
    """One condition. snr: decibels, None = clean; wer: a fraction."""

    labels: str
    modality: str
    snr: float | None
    clips: int
    words: int
    substitutions: int
    deletions: int
    insertions: int
    wer: float


def evaluate(
    model,
    processor,
    root: str | Path,
    labels: str,
    *,
    modalities: Sequence[str] | None = None,
    snrs: Sequence[float | None] = (None,),
    noise: str | Path = "babble",
    babble_labels: str = "train.csv",
    num_beams: int = 1,
    max_frames: int = 1500,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[Row], list[dict]]:
    """Transcribe every clip of `labels` in every condition.

    Args:
        modalities: of "audio", "video", "audiovisual"; by default all that the model has.
        snrs: decibels, None = clean. Lips hear no noise: video is scored once, as clean.
        noise: "babble" (clips of `babble_labels` talking at once) or a noise file; the same noise for every model.
        max_frames: video frames in a batch.

    Returns:
        The rows, and for each row its transcripts: {"id", "reference", "hypothesis"} by clip.
    """
    source = None
    if any(snr is not None for snr in snrs):
        source = Babble.from_labels(root, babble_labels) if noise == "babble" else NoiseFile(noise)
    conditions = [
        (modality, snr)
        for modality in modalities or supported(model)
        for snr in (snrs if modality != "video" else (None,))
    ]
    rows, transcripts = [], []
    clips = Lrs3Dataset(root, labels)
    with tqdm(total=len(conditions) * len(clips), desc="evaluate", unit="clip", disable=not progress) as bar:
        for modality, snr in conditions:
            bar.set_postfix_str(f"{modality} {'clean' if snr is None else f'{snr:g} dB'}")
            added = None if snr is None else Noise(source, (snr,))
            data = Lrs3Dataset(root, labels, modality, noise=added, seed=seed)
            texts = transcribe_dataset(model, processor, data, num_beams=num_beams, max_frames=max_frames, bar=bar)
            references = [clip.text for clip in data.clips]
            errors = word_errors(references, texts)
            rows.append(Row(Path(labels).stem, modality, snr, len(data), **asdict(errors), wer=round(errors.wer, 5)))
            transcripts.append(
                [
                    {"id": clip.id, "reference": clip.text, "hypothesis": text}
                    for clip, text in zip(data.clips, texts, strict=True)
                ]
            )
    return rows, transcripts


def supported(model) -> tuple[str, ...]:
    """The modalities a model can be given."""
    towers = tuple(model.config.modalities)
    return MODALITIES if len(towers) == 2 else towers


def transcribe_dataset(model, processor, data, *, num_beams: int = 1, max_frames: int = 1500, bar=None) -> list[str]:
    """The model's text for every clip, in the data's order."""
    texts = [""] * len(data)
    for batch in FrameBatchSampler(data.lengths, max_frames, shuffle=False):
        for index, text in zip(
            batch, transcribe_items(model, processor, [data[i] for i in batch], num_beams), strict=True
        ):
            texts[index] = text
        if bar is not None:
            bar.update(len(batch))
    return texts


def transcribe_items(model, processor, items: Sequence[dict], num_beams: int = 1) -> list[str]:
    """The model's text for transformed clips that share their modality."""
    streams = {name: [item[name] for item in items] for name in ("audio", "video") if items[0].get(name) is not None}
    return transcribe_batch(model, processor, num_beams=num_beams, **streams)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, WER in per cent: a line for each label file and modality, a column for each SNR."""
    snrs = sorted({row.snr for row in rows}, key=lambda snr: (snr is not None, -(snr or 0)))
    head = ["clean" if snr is None else f"{snr:g} dB" for snr in snrs]
    lines = ["| labels | modality | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for labels, modality in dict.fromkeys((row.labels, row.modality) for row in rows):
        found = {row.snr: row.wer for row in rows if (row.labels, row.modality) == (labels, modality)}
        cells = [f"{100 * found[snr]:.1f}" if snr in found else "" for snr in snrs]
        lines.append(f"| {labels} | {modality} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
