"""`python -m benchmarks data`: the throughput of one data worker that reads shards, against decoding only.

Each round processes the same clips once with one worker, in several ways:

- decoder: a plain loop over the encoded clips in memory that only decodes sound and video;
- decoder and transforms: the same loop with a training's processing: transforms, babble, batches of features;
- from shards: a training's own loader with one worker process, once for decoded clips, once for the batches.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks import environment, measure, results, say
from llama_smop.data.shards.read import ShardClips, read_shard
from llama_smop.data.shards.write import write_shards
from llama_smop.data.synthetic.corpus import make_corpus
from llama_smop.data.training_plan import Draw
from llama_smop.training.build import Collator, build_model, training_clips, training_plan
from llama_smop.training.config import TrainConfig
from llama_smop.training.setbacks import ReplacedClips

CLIPS, SHARD, WINDOW = 200, 32, 64
STAGE = {"modalities": {"audiovisual": 1}, "noise": True}


def run(path: Path | None = None, quick: bool = False, say: Callable[[str], None] = say) -> dict:
    """Measure and save; `path` defaults to the device's file under benchmarks/results/."""
    began = time.perf_counter()
    found = results.new("data")
    found["environment"] = environment.describe(torch.device("cpu"))
    if path is None:
        path = results.FOLDER / f"{results.slug('data', found['environment'])}.json"
    clips, shard = (24, 4) if quick else (CLIPS, SHARD)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus", clips=clips, seed=0)
        write_shards(corpus, "train.csv", Path(folder) / "shards", clips_per_shard=shard)
        found["data"] = compare(Path(folder) / "shards", 0 if quick else 40, 1 if quick else 5)
    found["stages"]["data"] = {"status": "done", "seconds": round(time.perf_counter() - began, 1)}
    found["environment"]["load_average_after"] = environment.describe(torch.device("cpu"))["load_average"]
    results.save(found, path)
    say(f"saved {path}")
    return found


def compare(shards: Path, budget_s: float, min_rounds: int) -> list[dict]:
    """One record a way of reading an epoch; ways are timed interleaved."""
    config = TrainConfig(
        model={"tiny": {}},
        data={"shards": str(shards), "window": WINDOW, "max_frames": 400, "stages": [STAGE], "workers": 1},
        optimizer={"epochs": 1},
    )
    drawn = training_clips(config)
    _, processor = build_model(config, drawn.source.texts)
    epoch = Epoch(config, drawn, Collator(processor))
    ways = {
        "decoder": epoch.decode,
        "decoder_transforms": epoch.decode_and_transform,
        "shards_decoded": epoch.stream_decoded,
        "shards": epoch.stream,
    }
    timings, noise = measure.interleaved(ways, measure.CpuClock(), budget_s, min_rounds)
    clips, seconds = len(drawn), sum(f for s in drawn.source.index.shards for f in s.frames) / 25
    return [
        {
            "way": way,
            "clips": clips,
            "seconds_a_clip": round(seconds / clips, 3),
            "epoch": timing.json(),
            "noise": round(noise, 4),
            "clips_per_s": round(clips / timing.median_us * 1e6, 2),
            "share_of_decoder": round(timings["decoder"].median_us / timing.median_us, 4),
            "share_of_decoder_and_transforms": round(timings["decoder_transforms"].median_us / timing.median_us, 4),
        }
        for way, timing in timings.items()
    ]


class Epoch:
    """The ways of processing every clip once."""

    def __init__(self, config: TrainConfig, drawn, collate: Collator):
        self.drawn, self.collate = drawn, collate
        self.plan = training_plan(config, drawn.source)
        self.batches = list(self.plan)
        self.held = InMemory(drawn.source)
        self.decoded = self._loader(Decoded(drawn.source), len)
        self.complete = self._loader(ReplacedClips(drawn, 0), collate)

    def decode(self) -> None:
        for batch in self.batches:
            for draw in batch:
                self.held.load(draw.index, draw.modality, draw.epoch)

    def decode_and_transform(self) -> None:
        drawn = type(self.drawn)(self.held, self.drawn.transform, self.drawn.noise, self.drawn.seed)
        for batch in self.batches:
            self.collate([drawn[draw] for draw in batch])

    def stream_decoded(self) -> None:
        for _ in self.decoded:
            pass

    def stream(self) -> None:
        for _ in self.complete:
            pass

    def _loader(self, dataset, collate) -> DataLoader:
        """A loader with a persistent worker, so that starting it does not count."""
        return DataLoader(dataset, batch_sampler=self.plan, collate_fn=collate, num_workers=1, persistent_workers=True)


class InMemory(ShardClips):
    """A source that holds all shards in memory before the clock starts."""

    def __init__(self, source: ShardClips):
        super().__init__(source.index)
        self._all = {place: read_shard(source.index.source, shard) for place, shard in enumerate(source.index.shards)}

    def _hold(self, position: int, epoch: int) -> dict:
        return self._all[position]


class Decoded(torch.utils.data.Dataset):
    """A source's decoded clips, untransformed."""

    def __init__(self, source: ShardClips):
        self.source = source

    def __getitem__(self, draw: Draw):
        return self.source.load(draw.index, draw.modality, draw.epoch)
