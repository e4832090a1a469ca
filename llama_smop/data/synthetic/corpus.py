"""A generated talking corpus in the LRS3 layout: synthetic voices and faces that say GRID-style sentences.

    OUT/generated/<voice>/<number>.mp4 and .wav    clips, 25 frames a second, 96×96; 16 kHz
    OUT/labels/{train,val,test,test_unseen_voice}.csv
    OUT/clips.jsonl                                 one line a clip: words with their times, hashes
    OUT/manifest.json                               settings, versions, counts, hashes of the labels

Clip i is a function of (settings, i) alone, so the same seed gives the same bytes with any number of workers, and
an interrupted run resumes where it stopped. All of it is synthetic: good for seeing a recogniser learn, no measure of
how well one reads people's lips.
"""

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import numpy as np
from scipy.signal import firwin, resample_poly
from tqdm import tqdm

from llama_smop.data.claim import NOTE, claim_folder
from llama_smop.data.media import write_audio, write_video
from llama_smop.data.synthetic.articulation import articulation
from llama_smop.data.synthetic.face import Face, draw_face
from llama_smop.data.synthetic.grammar import GRID, CorpusError, Grammar
from llama_smop.data.synthetic.journal import JOURNAL, read_journal
from llama_smop.data.synthetic.mouth import render
from llama_smop.data.synthetic.speech import speak
from llama_smop.models.units import AUDIO_RATE, SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE
from llama_smop.system import files
from llama_smop.system.processes import WorkerLost, cores, unordered

DATASET = "generated"
SPLITS = ("train", "val", "test", "test_unseen_voice")
DRAWING = 2  # raised when clips of the same settings come out differently; 1: corpora that do not say it
_UP, _DOWN = 320, 441  # espeak-ng's 22 050 Hz to 16 000
SHARES = (0.80, 0.05, 0.10, 0.05)


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker: an espeak-ng voice with its ranges of pitch and rate, and a face."""

    name: str
    espeak: str
    face: Face
    pitch: tuple[int, int] = (42, 58)
    words_per_minute: tuple[int, int] = (165, 200)


VOICES = (
    Voice("amir", "gmw/en-US+m3", draw_face(2, bearded=True)),
    Voice("beth", "gmw/en-US+f1", draw_face(0)),
    Voice("carl", "gmw/en-US+m7", draw_face(5), pitch=(34, 50)),
    Voice("dina", "gmw/en-US+f4", draw_face(3)),
    Voice("eric", "gmw/en-GB-x-rp+m1", draw_face(7, bearded=True)),
    Voice("fola", "gmw/en-US+linda", draw_face(4)),
)
UNSEEN_VOICES = (
    Voice("gita", "gmw/en-US+Annie", draw_face(8)),
    Voice("hugh", "gmw/en-US+m4", draw_face(9, bearded=True)),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of a corpus, apart from library versions."""

    clips: int
    seed: int
    grammar: Grammar = GRID
    voices: tuple[Voice, ...] = VOICES
    unseen_voices: tuple[Voice, ...] = UNSEEN_VOICES
    shares: tuple[float, ...] = SHARES
    drawing: int = DRAWING

    def __post_init__(self):
        if self.clips < 8:
            raise CorpusError(f"a corpus needs at least 8 clips for its four splits, got {self.clips}")
        if len(self.shares) != len(SPLITS) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise CorpusError(f"shares of {', '.join(SPLITS)}: expected numbers > 0 of sum 1, got {self.shares}")
        names = [voice.name for voice in (*self.voices, *self.unseen_voices)]
        if not self.voices or not self.unseen_voices or len(set(names)) != len(names):
            raise CorpusError(f"expected voices and unseen voices with distinct names, got {names}")
        if self.grammar.size < len(SPLITS):
            raise CorpusError(f"the grammar has {self.grammar.size} sentences, too few for four splits")

    def as_json(self) -> dict:
        content = json.loads(json.dumps(asdict(self)))
        if self.drawing == 1:
            del content["drawing"]
        return content


@dataclass(frozen=True)
class _Task:
    index: int
    split: str
    words: tuple[str, ...]
    voice: Voice = field(repr=False)

    @property
    def path(self) -> str:
        return f"{self.voice.name}/{self.index:05d}.mp4"


def _apportion(total: int, shares: tuple[float, ...]) -> list[int]:
    """Whole numbers ≥ 1 of sum `total` near total·shares; the first takes the rounding."""
    counts = [max(1, round(total * share)) for share in shares[1:]]
    return [total - sum(counts), *counts]


def _plan(settings: Settings) -> list[_Task]:
    """Every clip's split, words and voice. No sentence is in two splits."""
    rng = np.random.default_rng([settings.seed, 0xC0])
    size = settings.grammar.size
    counts = _apportion(settings.clips, settings.shares)
    # With fewer sentences than clips, each split repeats its own share of them.
    pools = counts if settings.clips <= size else _apportion(size, settings.shares)
    numbers = rng.choice(size, sum(pools), replace=False)
    tasks: list[_Task] = []
    for split, count, pool in zip(SPLITS, counts, pools, strict=True):
        own, numbers = numbers[:pool], numbers[pool:]
        voices = settings.unseen_voices if split == "test_unseen_voice" else settings.voices
        turn = rng.integers(len(voices))
        for i in range(count):
            words = settings.grammar.sentence(int(own[i % pool]))
            tasks.append(_Task(len(tasks), split, words, voices[(turn + i + i // pool) % len(voices)]))
    return tasks


@cache
def _low_pass() -> np.ndarray:
    """`resample_poly`'s own filter, which it would design for every clip."""
    return firwin(20 * _DOWN + 1, 1 / _DOWN, window=("kaiser", 5.0))


def make_clip(
    words: tuple[str, ...], voice: Voice, grammar: Grammar, seed: int, index: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, float, float]]]:
    """One clip: frames uint8 (T, 96, 96, 3), samples float32 (T·640,), and words with their times in seconds."""
    rng = np.random.default_rng([seed, index])
    speech = speak(
        grammar.as_spoken(words),
        voice.espeak,
        words_per_minute=int(rng.integers(*voice.words_per_minute, endpoint=True)),
        pitch=int(rng.integers(*voice.pitch, endpoint=True)),
        range=int(rng.integers(35, 65)),
    )
    lead, tail = rng.uniform(0.08, 0.20, 2)
    voiced = resample_poly(speech.samples.astype(np.float64) / 32768, _UP, _DOWN, window=_low_pass())
    n_frames = ceil((lead + len(voiced) / AUDIO_RATE + tail) * VIDEO_RATE)
    samples = rng.normal(0, 10 ** (-58 / 20), n_frames * SAMPLES_PER_VIDEO_FRAME)  # the noise floor of a room
    start = round(lead * AUDIO_RATE)
    loudness = 10 ** (rng.uniform(-26, -20) / 20)
    samples[start : start + len(voiced)] += voiced * (loudness / np.sqrt(np.mean(voiced**2)))
    samples = np.clip(samples, -1, 1).astype(np.float32)

    face = replace(  # the light differs a little from clip to clip
        voice.face,
        light=voice.face.light + rng.uniform(-0.25, 0.25),
        brightness=voice.face.brightness * rng.uniform(0.92, 1.06),
    )
    parameters = articulation(speech.phonemes, n_frames, offset=lead)
    frames = render(parameters, face, seed=int(rng.integers(2**31)))
    times = [
        (word, round(lead + segment.start, 3), round(lead + segment.end, 3))
        for word, segment in zip(words, speech.words, strict=True)
    ]
    return frames, samples, times


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(task: _Task, root: Path, grammar: Grammar, seed: int) -> dict:
    frames, samples, times = make_clip(task.words, task.voice, grammar, seed, task.index)
    mp4 = root / DATASET / task.path
    wav = mp4.with_suffix(".wav")
    write_audio(wav, samples)
    write_video(mp4, frames, audio=samples)
    return {
        "index": task.index,
        "split": task.split,
        "path": task.path,
        "n_frames": len(frames),
        "text": " ".join(task.words),
        "words": times,
        "sha256": {"mp4": _sha256(mp4), "wav": _sha256(wav)},
    }


def _one_core() -> None:
    import cv2

    cv2.setNumThreads(1)


def _records(tasks: list[_Task], root: Path, settings: Settings, workers: int) -> Generator[dict, None, None]:
    """Make the clips and yield their records as they finish."""
    make = partial(_make, root=root, grammar=settings.grammar, seed=settings.seed)
    try:
        yield from unordered(make, tasks, workers if workers > 1 else 0, _one_core)
    except WorkerLost:
        raise CorpusError(
            "a worker process ended (out of memory? a script without `if __name__ == '__main__':`?); "
            "run again to go on, or with workers=1"
        ) from None


def _finished(root: Path, tasks: list[_Task]) -> dict[int, dict]:
    """Records of the clips that an earlier run finished and whose files are still as it left them."""
    by_index = {task.index: task for task in tasks}
    kept: dict[int, dict] = {}
    for record in read_journal(root):
        task = by_index.get(record["index"])
        found = (record["split"], record["path"], record["text"])
        if task is None or found != (task.split, task.path, " ".join(task.words)):
            continue
        mp4 = root / DATASET / record["path"]
        wav = mp4.with_suffix(".wav")
        if not (mp4.exists() and wav.exists()):
            continue
        if record["sha256"] == {"mp4": _sha256(mp4), "wav": _sha256(wav)}:
            kept[task.index] = record
    return kept


def _drawing(root: Path) -> int:
    """The version of the drawings in a corpus; in a new one, this version's."""
    note = root / NOTE
    content = files.read_json(note) if note.exists() else {"drawing": DRAWING}
    drawing = content.get("drawing", 1) if isinstance(content, dict) else 1
    return drawing if isinstance(drawing, int) else 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def make_corpus(
    out: str | os.PathLike,
    clips: int = 600,
    seed: int = 0,
    grammar: Grammar = GRID,
    voices: tuple[Voice, ...] = VOICES,
    unseen_voices: tuple[Voice, ...] = UNSEEN_VOICES,
    shares: tuple[float, ...] = SHARES,
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Writes a corpus into the folder `out` and returns it; run again after an interruption, it resumes.

    workers: processes, by default one a core; the bytes do not depend on it. Raises CorpusError where the folder holds
    something else, or an unfinished corpus of clips that this version would draw differently, and where the extra
    `[corpus]` is not installed.
    """
    if missing := [name for name in ("espeakng_loader", "cv2") if find_spec(name) is None]:
        raise CorpusError(f"{' and '.join(missing)} not installed: pip install 'llama-smop[corpus]'")
    root = Path(out)
    settings = Settings(clips, seed, grammar, tuple(voices), tuple(unseen_voices), tuple(shares), _drawing(root))
    claim_folder(root, settings.as_json(), "generated corpus", CorpusError)
    for leftover in root.glob(f"{DATASET}/*/.*.writing-*"):
        leftover.unlink()
    tasks = _plan(settings)
    records = _finished(root, tasks)
    todo = [task for task in tasks if task.index not in records]
    if todo and settings.drawing != DRAWING:
        raise CorpusError(
            f"{root} is unfinished, and this version draws clips differently: delete it, or finish it with the version "
            "that began it"
        )
    if workers is None:
        workers = min(cores(), ceil(len(todo) / 24))  # a process takes seconds to start, a clip 0.1 s

    bar = tqdm(total=len(tasks), initial=len(records), desc="corpus", unit="clip", disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(bar)
        journal = stack.enter_context(open(root / JOURNAL, "a", encoding="utf-8"))
        if records:
            journal.write("\n")  # ends a line that a kill may have cut
        made = stack.enter_context(closing(_records(todo, root, settings, workers)))
        for record in made:
            records[record["index"]] = record
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            bar.update()

    ordered = [records[task.index] for task in tasks]
    files.write_text(root / JOURNAL, "".join(json.dumps(record) + "\n" for record in ordered))
    counts, hashes = {}, {}
    for split in SPLITS:
        own = [r for r in ordered if r["split"] == split]
        lines = [f"{DATASET},{r['path']},{r['n_frames']},0,{r['text']}\n" for r in own]
        path = root / "labels" / f"{split}.csv"
        files.write_text(path, "".join(lines))
        seconds = round(sum(r["n_frames"] for r in own) / VIDEO_RATE, 2)
        counts[split] = {"clips": len(own), "sentences": len({r["text"] for r in own}), "seconds": seconds}
        hashes[f"labels/{split}.csv"] = _sha256(path)
    packages = ("llama-smop", "espeakng-loader", "opencv-python-headless", "av", "soundfile", "numpy", "scipy")
    manifest = {
        "what": "synthetic talking faces: espeak-ng speech, rendered mouths",
        "settings": settings.as_json(),
        "counts": counts,
        "versions": {name: _version(name) for name in packages},
        "sha256": hashes,
    }
    files.write_text(root / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return root
