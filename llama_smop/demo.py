"""The demo: make a corpus, train, score, transcribe, measure projectors, write a report, on one machine.

Every stage writes its result into the folder. An interrupted demo resumes at the first stage without a result.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path

import numpy as np
import torch

from llama_smop.data.degrade import Degradation
from llama_smop.data.lrs3 import Clip, Lrs3Dataset
from llama_smop.data.noise import Noise
from llama_smop.data.sources import FolderClips
from llama_smop.data.synthetic.corpus import GRID, make_corpus
from llama_smop.data.synthetic.film import film_clip
from llama_smop.data.transforms import CROP
from llama_smop.evaluation.expert_use import expert_activation
from llama_smop.evaluation.run import Row, evaluate, records, table, transcribe_dataset, transcribe_items
from llama_smop.evaluation.wer import guess_per_slot, snr_label, word_errors
from llama_smop.models import model_folder, seal
from llama_smop.models.card import rewrite_card
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME
from llama_smop.reports import projector_cost
from llama_smop.reports.demo import write_report
from llama_smop.system import files
from llama_smop.system.extras import remedy
from llama_smop.system.lock import LOCK, folder_lock
from llama_smop.training.config import TrainConfig, read_config
from llama_smop.training.run import train
from llama_smop.transcription.run import transcripts

# Clips and training file: of minutes, or of the figures in the documents.
QUICK, FULL = (1200, "demo-quick"), (1400, "demo")
REQUEST = "asked.json"  # clips and configuration of the demo in a folder
SNRS = (None, 5, 0, -5)
PICTURES = tuple(Degradation("blur", deviation) for deviation in (1.5, 3, 6))
PICTURE_CLIPS = 24  # test clips that are scored with worse pictures
STAGES = 7


def demo(
    out: str | Path, clips: int | None = None, steps: int | None = None, seed: int = 0, full: bool = False
) -> Path:
    """Run every stage without a result in `out` and return the report's path.

    full: more clips and a longer training, for a lower word error rate.
    clips, steps: size of the corpus and length of the training. Smaller numbers give a quick look with a higher word
    error rate.

    Raises:
        ValueError: `out` holds a demo of another size, training or seed, or other files; another demo runs in it.
    """
    out = Path(out)
    usual, training = FULL if full else QUICK
    clips = usual if clips is None else clips
    config = demo_config(out, steps, seed, training)
    if out.is_dir() and not (out / REQUEST).exists() and set(os.listdir(out)) - {LOCK}:
        raise ValueError(f"{out}: is not empty and holds no demo; choose another --out")
    with folder_lock(out, "another demo"):
        files.claim(out / REQUEST, _request(clips, config), "demo", ignored={LOCK}, upgrade=_upgrade_request)
        return _run_stages(out, config, clips, seed)


def _run_stages(out: Path, config: TrainConfig, clips: int, seed: int) -> Path:
    corpus, run = out / "corpus", out / "run"

    _stage(1, "a talking corpus", lambda: make_corpus(corpus, clips=clips, seed=seed))
    _stage(2, "training", lambda: _timed(out, "training", lambda: train(config, run)), done=run / "model")
    if not (out / "metrics.json").exists():
        files.write_text(out / "metrics.json", (run / "metrics.json").read_text())
    model, processor = model_folder.load(run / "model")
    _stage(3, "scoring", lambda: _score(out, model, processor, seed), done=out / "evaluation.json")
    _stage(4, "three transcripts", lambda: _transcripts(out, model, processor, seed), done=out / "transcripts.json")
    _stage(5, "worse pictures", lambda: _pictures(out, model, processor, seed), done=out / "pictures.json")
    raw = out / "raw_video.json"
    _stage(6, "from a raw video", lambda: _raw_videos(out, raw), done=None if _lacked(raw) else raw)
    _stage(7, "dense against sparse", lambda: _projectors(out), done=out / "projectors.json")
    _facts(out, config, clips)
    report = write_report(out)
    print(f"\nreport: {report}")
    return report


def demo_config(out: Path, steps: int | None, seed: int, training: str) -> TrainConfig:
    overrides: dict = {"data": {"root": str(out / "corpus")}, "run": {"seed": seed}}
    if steps is not None:
        overrides["optimizer"] = {"steps": steps}
    return read_config(resources("llama_smop") / "configs" / f"{training}.yaml", overrides)


def _request(clips: int, config: TrainConfig) -> dict:
    return {"clips": clips, "config": config.model_dump(mode="json", exclude={"data": {"root"}})}


def _upgrade_request(noted: dict) -> dict:
    """Fields of the configuration that are newer than the note get their defaults."""
    config = noted["config"]
    return _request(noted["clips"], TrainConfig.model_validate(config | {"data": config["data"] | {"root": "corpus"}}))


def _stage(number: int, name: str, work: Callable[[], object], done: Path | None = None) -> None:
    if done is not None and done.exists():
        print(f"[{number}/{STAGES}] {name}: done before")
        return
    print(f"[{number}/{STAGES}] {name}")
    start = time.perf_counter()
    work()
    print(f"      {time.perf_counter() - start:.0f} s")


def _timed(out: Path, name: str, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    files.write_json(out / f"{name}_seconds.json", round(time.perf_counter() - start, 1))


def _score(out: Path, model, processor, seed: int) -> None:
    corpus = out / "corpus"
    beside = {"seed": seed, "workers": 1}  # clips are decoded beside the model
    rows, _ = evaluate(model, processor, corpus, "test.csv", snrs=SNRS, **beside)
    unseen, _ = evaluate(model, processor, corpus, "test_unseen_voice.csv", snrs=(None, 0), **beside)
    rows += unseen
    test = Lrs3Dataset(corpus, "test.csv")
    files.write_json(
        out / "evaluation.json",
        {
            "rows": [asdict(row) for row in rows],
            "guess_per_slot": guess_per_slot(GRID),
            "no_input": _no_input(model, processor, test),
            "expert_activation": expert_activation(model, processor, test),
        },
    )
    _write_card(out, rows)
    print(table(rows))


def _write_card(out: Path, rows: Sequence[Row]) -> None:
    """Put the scores into the card of the model, unless somebody edited it."""
    model = out / "run" / "model"
    if not seal.is_edited(model / seal.CARD):
        found = [(out / "evaluation.json", records(rows, model, out / "corpus", "babble", num_beams=1))]
        rewrite_card(LlamaSmopForConditionalGeneration, model, {}, found)


def _no_input(model, processor, test: Lrs3Dataset) -> float:
    """Word error rate for silence and a blank picture of each clip's length; clips of one length have one text."""
    lengths = sorted(set(test.lengths))
    texts = {}
    for start in range(0, len(lengths), 16):
        chosen = lengths[start : start + 16]
        blank = [
            {"audio": np.zeros(n * SAMPLES_PER_VIDEO_FRAME, np.float32), "video": torch.zeros(n, 1, CROP, CROP)}
            for n in chosen
        ]
        texts |= zip(chosen, transcribe_items(model, processor, blank), strict=True)
    return word_errors([clip.text for clip in test.clips], [texts[n] for n in test.lengths]).wer


def _transcripts(out: Path, model, processor, seed: int) -> None:
    """Three test clips, of different speakers, in four conditions."""
    corpus, chosen = out / "corpus", _chosen(out)
    babble = Noise(FolderClips(corpus, "train.csv").babble, (0,))
    conditions = {
        "audio + video": ("audiovisual", None),
        "audio + video at 0 dB": ("audiovisual", babble),
        "audio at 0 dB": ("audio", babble),
        "video": ("video", None),
    }
    heard: dict[str, list] = {clip.id: [] for clip in chosen}
    for name, (modality, noise) in conditions.items():
        data = Lrs3Dataset(corpus, "test.csv", modality, noise=noise, seed=seed)
        data.clips = chosen
        for clip, text in zip(chosen, transcribe_dataset(model, processor, data), strict=True):
            heard[clip.id].append({"condition": name, "text": text})
    records = [
        {
            "id": clip.id,
            "path": str(clip.video_path(corpus).relative_to(out)),
            "reference": clip.text,
            "hypotheses": heard[clip.id],
        }
        for clip in chosen
    ]
    files.write_json(out / "transcripts.json", records)
    for record in records:
        print(f"      said   {record['reference']}\n      heard  {record['hypotheses'][0]['text']}")


def _chosen(out: Path) -> list[Clip]:
    """Three test clips, of different speakers."""
    clips = Lrs3Dataset(out / "corpus", "test.csv").clips
    return list({clip.path.split("/")[0]: clip for clip in reversed(clips)}.values())[:3]


def _pictures(out: Path, model, processor, seed: int) -> None:
    """Some test clips with blurred pictures, in babble and alone."""
    degradations = (None, *PICTURES)
    rows, _ = evaluate(
        model,
        processor,
        out / "corpus",
        "test.csv",
        snrs=(0,),
        degradations=degradations,
        most=PICTURE_CLIPS,
        seed=seed,
        workers=1,
    )
    files.write_json(out / "pictures.json", [asdict(row) for row in rows])
    print(table(rows))


def _lacked(raw: Path) -> bool:
    """Whether the models that find faces were missing before."""
    return raw.exists() and "missing" in files.read_json(raw)


def _raw_videos(out: Path, to: Path) -> None:
    """Test clips as a camera would have filmed their speakers: what is read of them, beside what of the clips."""
    try:
        from llama_smop.data.faces.export import crop_video
        from llama_smop.data.faces.model_files import FaceModelError
    except ModuleNotFoundError as error:
        return _missing(to, remedy(error.name or "cv2"))
    chosen = _chosen(out)
    prepared = [clip.video_path(out / "corpus") for clip in chosen]
    films = [out / "raw_video" / f"{clip.id.replace('/', '-')}.mp4" for clip in chosen]
    for clip, film in zip(prepared, films, strict=True):
        film_clip(clip, film)
        try:
            crop_video(film, film.with_suffix(".crop.mp4"), sheet=film.with_suffix(".png"))
        except FaceModelError as error:
            return _missing(to, str(error))
    read = {found.path: found for found in transcripts([*films, *prepared], out / "run" / "model")}
    records = []
    for clip, film, path in zip(chosen, films, prepared, strict=True):
        raw, text = read[film], read[path].text
        print(f"      raw    {raw.text}\n      clip   {text}")
        record = {"id": clip.id, "reference": clip.text, "raw": raw.text, "prepared": text}
        records.append(record | {"sheet": str(film.with_suffix(".png").relative_to(out)), "warnings": raw.warnings})
    files.write_json(to, {"clips": records})


def _missing(to: Path, reason: str) -> None:
    print(f"      left out: {reason}")
    files.write_json(to, {"missing": reason})


def _projectors(out: Path) -> None:
    tokens = 256
    rows = projector_cost.compare(projector_cost.paper_projectors(), tokens)
    what = (
        f"The paper's size, 1024 → 2048 → 2048, {tokens} tokens, float32, on this machine's CPU "
        f"({torch.get_num_threads()} threads), interleaved, medians. All of them end in a LayerNorm."
    )
    files.write_json(out / "projectors.json", {"what": what, "rows": rows})
    for row in rows:
        print(
            f"      {row['name']:32s} {row['tokens_per_second']:8.0f} tokens/s {row['kept_bytes'] / 1e6:6.1f} MB kept"
        )


def _facts(out: Path, config: TrainConfig, clips: int) -> None:
    manifest = files.read_json(out / "corpus" / "manifest.json")
    counts = manifest["counts"]
    projector, noise = config.model.projector, config.data.noise
    snrs = ", ".join(dict.fromkeys(map(snr_label, noise.snrs)))
    minutes = sum(c["seconds"] for c in counts.values()) / 60
    facts = {
        "corpus": f"{clips} synthetic clips, {minutes:.0f} minutes, seed {config.run.seed}",
        "model": f"{projector.sharing}, {projector.num_experts} experts, top {projector.top_k}, trained from scratch",
        "training": f"{config.optimizer.steps} steps, {files.read_json(out / 'training_seconds.json'):.0f} s",
        "training noise": f"babble: {snrs}, after a clean start",
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("llama-smop", "torch", "transformers")),
    }
    files.write_json(
        out / "demo.json",
        {"train_clips": counts["train"]["clips"], "test_clips": counts["test"]["clips"], "facts": facts},
    )
