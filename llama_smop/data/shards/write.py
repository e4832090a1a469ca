"""Write clips of the LRS3 layout as shards."""

import io
import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llama_smop.data.claim import claim_folder
from llama_smop.data.container import naming, read_whole
from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import write_bytes
from llama_smop.data.shards.index import FORMAT, INDEX, Shard, ShardError, webdataset
from llama_smop.system import files


def write_shards(
    root: str | os.PathLike,
    label_file: str,
    out: str | os.PathLike,
    clips_per_shard: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> list[Shard]:
    """Writes the clips of a label file (LRS3 layout) as tar shards into the folder `out`, in an order drawn by `seed`.

    They are of like size, at most `clips_per_shard`. A clip is two or three files: `{number}.mp4` or as it ends, `.wav`
    where there is one, and `.json` with its id and text. Shards are written aside and renamed; run again after an
    interruption, finished ones are kept. Raises MediaError naming a clip that is missing, ShardError where `out` holds
    other shards.
    """
    writer = webdataset().TarWriter
    if clips_per_shard < 1:
        raise ValueError(f"expected at least one clip a shard, got {clips_per_shard}")
    root, out = Path(root), Path(out)
    clips = read_labels(root, label_file)
    digest = sha256("\n".join(f"{c.id},{c.n_frames},{c.text}" for c in clips).encode()).hexdigest()
    settings = {"labels": digest, "clips_per_shard": clips_per_shard, "seed": seed}
    claim_folder(out, settings, "shards", ShardError)

    order = np.random.default_rng([seed, 0x5D]).permutation(len(clips))
    shards: list[Shard] = []
    with tqdm(total=len(clips), desc="shards", unit="clip", disable=not progress) as bar:
        for chosen in np.array_split(order, -(-len(clips) // clips_per_shard)):
            numbers = chosen.tolist()
            shard = Shard(f"clips-{len(shards):06d}.tar", tuple(numbers), tuple(clips[n].n_frames for n in numbers))
            if not (out / shard.name).exists():
                buffer = io.BytesIO()
                with writer(buffer, encoder=False, mtime=0) as tar:
                    for number in numbers:
                        tar.write({"__key__": f"{number:08d}", **_members(root, clips[number])})
                write_bytes(out / shard.name, buffer.getvalue())
            shards.append(shard)
            bar.update(len(numbers))
    words = sorted({word for clip in clips for word in clip.text.lower().split()})
    index = {"format": FORMAT, "settings": settings, "words": words, "shards": [asdict(shard) for shard in shards]}
    files.write_text(out / INDEX, json.dumps(index) + "\n")
    return shards


def _members(root: Path, clip) -> dict[str, bytes]:
    video = clip.video_path(root)
    members = {}
    for path in (video, video.with_suffix(".wav")):
        with naming(path):
            if path == video or os.path.exists(path):
                members[path.suffix[1:].lower() or "clip"] = read_whole(path)
    members["json"] = json.dumps({"id": clip.id, "text": clip.text}).encode()
    return members
