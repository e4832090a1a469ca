"""Word error rate of a model on a label file, by modality, compression rate, noise and degradation of the picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise, product
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from llama_smop.data.batching import FrameBatchSampler
from llama_smop.data.degrade import Degradation
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.data.media import MediaError
from llama_smop.data.noise import Noise, NoiseFile
from llama_smop.data.sources import FolderClips
from llama_smop.evaluation.wer import per_cent, snr_label, snr_order, word_errors
from llama_smop.models.decoding import transcribe_batch
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.rates import Rate, rate_text
from llama_smop.models.seal import fingerprint
from llama_smop.models.units import MODALITIES, SAMPLES_PER_VIDEO_FRAME, SAMPLES_PER_WHISPER_FRAME, STREAMS


@dataclass(frozen=True)
class Row:
    """One condition. snr: decibels, None = clean; wer: a fraction; degradation: as "blur:3", None = none; rate: as
    "16,5", None = the only one that the model has."""

    labels: str
    modality: str
    snr: float | None
    clips: int
    words: int
    substitutions: int
    deletions: int
    insertions: int
    wer: float
    degradation: str | None = None
    rate: str | None = None


def evaluate(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    root: str | Path,
    labels: str,
    *,
    modalities: Sequence[str] | None = None,
    snrs: Sequence[float | None] = (None,),
    degradations: Sequence[Degradation | None] = (None,),
    rates: Sequence[Rate | str] | None = None,
    noise: str | Path = "babble",
    babble_labels: str = "train.csv",
    num_beams: int = 1,
    max_frames: int = 1500,
    most: int | None = None,
    seed: int = 0,
    workers: int = 0,
    distributed: bool = False,
    progress: bool = True,
) -> tuple[list[Row], list[dict]]:
    """Transcribe every clip of `labels` in every condition, on the model's device.

    Args:
        modalities: of "audio", "video", "audiovisual"; by default all that the model has.
        snrs: decibels, None = clean. Lips hear no noise: video is scored as clean alone.
        degradations: of the picture, None = as it is. Ears see none: audio is scored with None alone. Sound and picture
            together are scored in every combination; a clip's noise and what is drawn for its picture do not depend on
            each other.
        rates: compression rates of the model; None = all that it has.
        noise: "babble" (clips of `babble_labels` talking at once) or a noise file; the same noise for every model.
        max_frames: video frames in a batch. most: only so many clips, the label file's first ones.
        workers: processes that decode clips ahead; the results do not depend on it.
        distributed: share the clips out over the processes of `torch.distributed`; all of them must call this, and
            all get the whole result.

    Returns:
        The rows, and for each row its transcripts: {"id", "reference", "hypothesis"} by clip.

    Raises:
        MediaError: a clip that cannot be used, by name; one whose label says that it is too long, before any other.
        ValueError: a rate that the model does not have.
    """
    known = model.config.known_rates
    asked = known if rates is None else tuple(dict.fromkeys(map(model.config.rate, rates)))
    source = None
    if any(snr is not None for snr in snrs):
        source = FolderClips(root, babble_labels).babble if noise == "babble" else NoiseFile(noise)
    conditions = [
        (modality, rate, snr, degradation)
        for modality in modalities or supported(model)
        for rate in asked
        for snr in (snrs if modality != "video" else (None,))
        for degradation in (degradations if modality != "audio" else (None,))
    ]
    rows, transcripts = [], []
    clips = Lrs3Dataset(root, labels)
    clips.clips = clips.clips[:most]
    heard, seen = (any(modality != other for modality, *_ in conditions) for other in ("video", "audio"))
    for clip, rate in product(clips.clips, asked):  # checked first: the longest clips are transcribed last
        samples = clip.n_frames * SAMPLES_PER_VIDEO_FRAME if heard else None
        reason = processor.unfit(samples=samples, frames=clip.n_frames if seen else None, rate=rate)
        if reason is not None:
            raise MediaError(clip.id, reason)
    rank = dist.get_rank() if distributed else 0
    shown = progress and rank == 0
    readings = []
    for modality, rate, snr, degradation in conditions:
        data = Lrs3Dataset(
            root,
            labels,
            modality,
            noise=None if snr is None else Noise(source, (snr,)),
            seed=seed,
            degradation=degradation,
            longest=processor.audio_window * SAMPLES_PER_WHISPER_FRAME // SAMPLES_PER_VIDEO_FRAME,
            unfit=partial(processor.unfit, rate=rate),
        )
        data.clips = clips.clips
        at = rate_text(rate) if len(known) > 1 else None
        name = " ".join(str(part) for part in (modality, at, snr_label(snr), degradation) if part is not None)
        readings.append(Reading(data, rate, name))
    with tqdm(total=len(conditions) * len(clips), desc="evaluate", unit="clip", disable=not shown) as bar:
        texts_of = transcribe_readings(
            model,
            processor,
            readings,
            num_beams=num_beams,
            max_frames=max_frames,
            workers=workers,
            distributed=distributed,
            bar=bar,
        )
    references = [clip.text for clip in clips.clips]
    for (modality, rate, snr, degradation), texts in zip(conditions, texts_of, strict=True):
        errors = word_errors(references, texts)
        at = rate_text(rate) if len(known) > 1 else None
        worse = None if degradation is None else str(degradation)
        counted = asdict(errors) | {"wer": round(errors.wer, 5)}
        rows.append(Row(Path(labels).stem, modality, snr, len(texts), **counted, degradation=worse, rate=at))
        transcripts.append(
            [
                {"id": clip.id, "reference": clip.text, "hypothesis": text}
                for clip, text in zip(clips.clips, texts, strict=True)
            ]
        )
    return rows, transcripts


def records(
    rows: Sequence[Row], model: str | Path, corpus: str | Path, noise: str | Path, num_beams: int
) -> list[dict]:
    """Rows as `evaluate --json` and a model's card keep them: with the corpus's name, the noise, the beams, and the
    fingerprint of the model folder, so that no other model's card takes them."""
    measured = {"corpus": Path(corpus).resolve().name, "beams": num_beams, "model_sha256": fingerprint(Path(model))}
    named = noise if noise == "babble" else Path(noise).name
    return [asdict(row) | measured | {"noise": None if row.snr is None else named} for row in rows]


def supported(model: LlamaSmopForConditionalGeneration) -> tuple[str, ...]:
    """The modalities that a model takes."""
    towers = tuple(model.config.modalities)
    return MODALITIES if len(towers) == 2 else towers


@dataclass(frozen=True)
class Reading:
    """Clips to transcribe at a compression rate, None = the default. name: for the progress bar."""

    data: Lrs3Dataset
    rate: Rate | str | None = None
    name: str = ""


def transcribe_dataset(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    data: Lrs3Dataset,
    *,
    rate: Rate | str | None = None,
    **settings,
) -> list[str]:
    """The model's text for every clip, in the data's order; `settings` as of `transcribe_readings`."""
    return transcribe_readings(model, processor, [Reading(data, rate)], **settings)[0]


def transcribe_readings(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    readings: Sequence[Reading],
    *,
    num_beams: int = 1,
    max_frames: int = 1500,
    workers: int = 0,
    distributed: bool = False,
    bar: tqdm | None = None,
) -> list[list[str]]:
    """For each reading the model's text for every clip, in the data's order. Workers decode ahead from one reading to
    the next; `workers` and `distributed` as in `evaluate`."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    first = [0, *accumulate(len(reading.data) for reading in readings)]
    batches = [
        (reading, [begin + index for index in batch])
        for begin, reading in zip(first, readings, strict=False)
        # Neighbours are of like length, so the shares are of like size.
        for batch in list(FrameBatchSampler(reading.data.lengths, max_frames, shuffle=False))[rank::world]
    ]
    clips = ConcatDataset([reading.data for reading in readings])
    loader = DataLoader(clips, batch_sampler=[batch for _, batch in batches], collate_fn=list, num_workers=workers)
    found: dict[int, str] = {}
    for (reading, batch), items in zip(batches, loader, strict=True):
        if bar is not None:
            bar.set_postfix_str(reading.name, refresh=False)
        found |= zip(batch, transcribe_items(model, processor, items, num_beams, reading.rate), strict=True)
        if bar is not None:
            bar.update(min(world * len(batch), bar.total - bar.n))
    if distributed:
        shares: list[dict[int, str]] = [{}] * world
        dist.all_gather_object(shares, found)
        found = {index: text for share in shares for index, text in share.items()}
    return [[found[index] for index in range(begin, end)] for begin, end in pairwise(first)]


def transcribe_items(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    items: Sequence[dict],
    num_beams: int = 1,
    rate: Rate | str | None = None,
) -> list[str]:
    """The model's text for transformed clips that share their modality."""
    streams = {name: [item[name] for item in items] for name in STREAMS if items[0].get(name) is not None}
    return transcribe_batch(model, processor, num_beams=num_beams, rate=rate, **streams)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, WER in per cent: a line for each label file, modality, rate and picture, a column for each
    SNR."""
    snrs = sorted({row.snr for row in rows}, key=snr_order)
    degraded, several = (any(getattr(row, name) is not None for row in rows) for name in ("degradation", "rate"))
    head = ["labels", "modality", *["rate"] * several, *["picture"] * degraded, *map(snr_label, snrs)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for condition in dict.fromkeys((row.labels, row.modality, row.rate, row.degradation) for row in rows):
        found = {r.snr: r.wer for r in rows if (r.labels, r.modality, r.rate, r.degradation) == condition}
        labels, modality, rate, worse = condition
        names = [labels, modality, *[rate or ""] * several, *[worse or ""] * degraded]
        cells = [*names, *(per_cent(found[snr]) if snr in found else "" for snr in snrs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
