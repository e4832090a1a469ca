"""A picture of a corpus: clips as strips of frames over time, with their words and their sound below."""

import io
import os
from pathlib import Path

import numpy as np

from llama_smop.data.lrs3 import Clip, LabelError, load_clip, read_labels
from llama_smop.data.media import write_bytes
from llama_smop.data.synthetic.journal import read_journal
from llama_smop.models.units import AUDIO_RATE, VIDEO_RATE
from llama_smop.system import files

_FRAMES = 16  # columns of the strip


def _choose(root: Path, n: int) -> list[tuple[str, Clip]]:
    """`n` clips from all label files in turn, from as many different folders (speakers) as there are."""
    label_files = sorted((root / "labels").glob("*.csv"))
    if not label_files:
        raise LabelError(f"{root / 'labels'}: holds no label file")
    pools = []
    for path in label_files:
        pool = [(path.stem, clip) for clip in read_labels(root, path)]
        seen: dict[str, int] = {}
        rank = []
        for _, clip in pool:  # a speaker's second clip comes after every speaker's first
            folder = str(Path(clip.path).parent)
            seen[folder] = seen.get(folder, 0) + 1
            rank.append(seen[folder])
        pools.append([pool[i] for i in np.argsort(rank, kind="stable")])
    # The largest split first: it has most of the speakers.
    pools.sort(key=len, reverse=True)
    chosen: list[tuple[str, Clip]] = []
    speakers: set[str] = set()
    for fresh in (True, False):
        for pool in pools:
            for item in pool:
                speaker = str(Path(item[1].path).parent)
                if len(chosen) < n and item not in chosen and (not fresh or speaker not in speakers):
                    chosen.append(item)
                    speakers.add(speaker)
    order = {pool[0][0]: i for i, pool in enumerate(pools)}
    return sorted(chosen, key=lambda item: (order[item[0]], item[1].path))


def _word_times(root: Path) -> dict[str, list]:
    return {record["path"]: record["words"] for record in read_journal(root)}


def _spectrogram(samples: np.ndarray) -> np.ndarray:
    """Decibels, (frequency, time), 0 to 5 kHz in 31.25 Hz, 8 ms steps."""
    window, hop = 512, 128
    padded = np.pad(samples, window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1)[:, : 5000 * window // AUDIO_RATE]) ** 2
    return 10 * np.log10(power.T + 1e-7)


def contact_sheet(root: str | os.PathLike, out_png: str | os.PathLike, n: int = 8) -> Path:
    """Draws `n` clips of the corpus in `root` into a PNG and returns its path.

    Words are put where they are said if the corpus has a `clips.jsonl` with their times.

    Raises:
        ValueError: the name says another format.
    """
    from matplotlib.figure import Figure  # not pyplot, which needs a display

    root, out = Path(root), Path(out_png)
    files.check_suffix(out, "PNG", ".png")
    files.check_file(out)
    chosen = _choose(root, n)
    times = _word_times(root)
    n = len(chosen)
    figure = Figure(figsize=(16, 1.0 + 1.85 * n), dpi=110, facecolor="white")
    top = 1 - 0.62 / (1.0 + 1.85 * n)
    figure.text(0.06, 1 - 0.40 / (1.0 + 1.85 * n), f"{root.name}: {_summary(root)}", fontsize=13, weight="bold")
    heights = [1.0, 0.24, 0.5, 0.2] * n  # strip, words, spectrogram, gap
    grid = figure.add_gridspec(4 * n, 1, height_ratios=heights, hspace=0, left=0.06, right=0.995, top=top, bottom=0.0)
    for row, (split, clip) in enumerate(chosen):
        samples, video = load_clip(clip.video_path(root))
        assert samples is not None and video is not None, "an audiovisual clip has both"
        duration = len(video) / VIDEO_RATE
        picks = ((np.arange(_FRAMES) + 0.5) / _FRAMES * len(video)).astype(int)

        axes = figure.add_subplot(grid[4 * row])
        strip = np.concatenate(list(video[picks]), axis=1)
        axes.imshow(strip, extent=(0, duration, 0, 1), aspect="auto", interpolation="bilinear")
        for edge in np.arange(1, _FRAMES) / _FRAMES * duration:
            axes.axvline(edge, color="white", linewidth=1.5)
        axes.set_axis_off()
        speaker = Path(clip.path).parent.as_posix()
        axes.text(-0.006, 0.62, speaker, transform=axes.transAxes, ha="right", fontsize=11, weight="bold")
        split_name = split.replace("_", "\n", 1)
        axes.text(
            -0.006, 0.5, split_name, transform=axes.transAxes, ha="right", va="top", fontsize=8.5, color="#555555"
        )

        below = figure.add_subplot(grid[4 * row + 2])
        sound = _spectrogram(samples)
        below.imshow(
            sound,
            extent=(0, len(samples) / AUDIO_RATE, 0, 1),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=sound.max() - 60,
            vmax=sound.max(),
        )
        below.set_xlim(0, duration)
        words = times.get(clip.path) or [(clip.text, 0.0, duration)]
        for word, start, end in words:
            if start > 0:
                below.axvline(start, color="white", linewidth=0.9, alpha=0.8)
            below.text((start + end) / 2, 1.06, word, ha="center", va="bottom", fontsize=11, clip_on=False)
        below.set_axis_off()
        below.text(-0.006, 0.5, f"{duration:.1f} s", transform=below.transAxes, ha="right", va="center", fontsize=8.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(out, picture.getvalue())
    return out


def _summary(root: Path) -> str:
    parts, seconds = [], 0.0
    for path in sorted((root / "labels").glob("*.csv")):
        clips = read_labels(root, path)
        parts.append(f"{len(clips)} {path.stem.replace('_', ' ')}")
        seconds += sum(clip.n_frames for clip in clips) / VIDEO_RATE
    kind = "synthetic clips" if (root / "manifest.json").exists() else "clips"
    return f"{kind}, {', '.join(parts)}; {seconds / 60:.1f} minutes"
