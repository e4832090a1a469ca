import shutil

import pytest

from llama_smop.data.shards.write import write_shards
from llama_smop.data.synthetic.corpus import make_corpus
from llama_smop.data.transforms import AudioTransform, ClipTransform, VideoTransform

TRAINING = ClipTransform(AudioTransform(train=True), VideoTransform(train=True))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Twelve generated clips; read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "twelve", clips=12, seed=3, progress=False, workers=1)


@pytest.fixture
def corpus_copy(small_corpus, tmp_path):
    """The same clips, to be damaged."""
    return shutil.copytree(small_corpus, tmp_path / "copy")


@pytest.fixture(scope="module")
def shards(small_corpus, tmp_path_factory):
    """The nine training clips in five shards."""
    pytest.importorskip("webdataset")
    out = tmp_path_factory.mktemp("shards") / "train"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=2, progress=False)
    return out
