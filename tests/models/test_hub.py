"""A model that names its parts, by hub name, in a subfolder, and pushed to a hub that is a folder here."""

import copy
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models import hub, pretrained
from llama_smop.models.assemble import assemble
from tests.golden_files import GOLDEN


@pytest.fixture(scope="module")
def assembled():
    torch.manual_seed(0)
    return assemble(
        language_model=GOLDEN / "full_model/llm_hf",
        audio_tower=GOLDEN / "whisper/hf_model",
        projector={"hidden_features": 16},
        lora={"language_model": {"r": 4, "alpha": 1}},
    )[0]


def same(loaded, model) -> bool:
    own = model.state_dict()
    return all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())


@pytest.fixture
def cache(assembled, tmp_path):
    """A hub cache as a download leaves it, with the model as user/trained."""
    root = tmp_path / "cache/models--user--trained"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    assembled.save_pretrained(root / "snapshots" / ("0" * 40))
    return tmp_path / "cache"


def test_by_hub_name(assembled, cache):
    loaded = LlamaSmopForConditionalGeneration.from_pretrained("user/trained", cache_dir=cache, local_files_only=True)
    assert same(loaded, assembled)


def test_by_hub_name_without_its_special_rows(cache):
    (rows,) = cache.rglob(pretrained.SPECIAL_TOKENS_FILE)
    rows.unlink()
    with pytest.raises(ValueError, match=r"user/trained: lacks special_tokens\.safetensors"):
        LlamaSmopForConditionalGeneration.from_pretrained("user/trained", cache_dir=cache, local_files_only=True)


def test_in_a_subfolder(assembled, tmp_path):
    assembled.save_pretrained(tmp_path / "sub")
    assert same(LlamaSmopForConditionalGeneration.from_pretrained(tmp_path, subfolder="sub"), assembled)


class FolderHub:
    """The few calls of huggingface_hub's HfApi that a push makes; a repository is a folder."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo_id, exist_ok=False, token=None, private=None):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.root / repo_id / operation.path_in_repo)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message, create_pr):
        for name in allow_patterns:
            shutil.copy(folder_path / name, self.root / repo_id / name)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    class Card:
        def save(self, path):
            with open(path, "w") as file:
                file.write("card")

    folder = tmp_path / "hub"
    monkeypatch.setattr(hub, "HfApi", lambda token=None: FolderHub(folder))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: FolderHub(folder))
    for module in ("llama_smop.models.hub", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: Card())
    return folder


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained", "save_pretrained by another name"])
def test_a_pushed_model_is_whole(assembled, tmp_path, hub_folder, way):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/private.txt").write_text("not for the hub")
    repository = "user/other" if "another" in way else "mine"
    if way == "push_to_hub":
        assembled.push_to_hub(repository)
    else:
        named = {"repo_id": repository} if "another" in way else {}
        assembled.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, **named)
    pushed = hub_folder / repository
    assert {f.name for f in pushed.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        pretrained.SPECIAL_TOKENS_FILE,
    }
    assert same(LlamaSmopForConditionalGeneration.from_pretrained(pushed), assembled)


def test_only_what_was_saved_last_is_loaded(pair, assembled, tmp_path):
    model = copy.deepcopy(pair[0])
    for value, size in ((1.0, "50GB"), (2.0, "500KB"), (3.0, "1MB"), (4.0, "50GB")):
        torch.nn.init.constant_(model.multi_modal_projector.w1, value)
        model.save_pretrained(tmp_path, max_shard_size=size)
        loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path)
        assert loaded.multi_modal_projector.w1.unique().item() == value, f"sharded by {size}, older weights came back"
        files = {f.name for f in tmp_path.glob("*.safetensors")}
        index = tmp_path / "model.safetensors.index.json"
        expected = (
            set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        )
        assert files == expected
    assembled.save_pretrained(tmp_path)
    assembled.save_pretrained(tmp_path, complete=True)
    assert not (tmp_path / pretrained.SPECIAL_TOKENS_FILE).exists()
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    assembled.save_pretrained(tmp_path, variant="other")
    kept = {"model.safetensors", "model.other.safetensors", "notes.safetensors"}
    assert kept <= {f.name for f in tmp_path.iterdir()}, "another variant's weights, or a stranger's file, were removed"


def test_loading_says_nothing_when_all_is_well(pair, tmp_path):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    pair[0].save_pretrained(tmp_path)
    logging.getLogger("transformers").addHandler(handler)
    try:
        LlamaSmopForConditionalGeneration.from_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [r.getMessage()[:200] for r in records] == []


def test_a_part_that_is_fetched_cannot_be_offloaded(assembled, tmp_path):
    assembled.save_pretrained(tmp_path / "small")
    assembled.save_pretrained(tmp_path / "whole", complete=True)
    places = {"audio_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "disk"}

    def load(name):
        settings = {"device_map": places, "offload_folder": tmp_path / f"{name} offloaded"}
        return LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / name, **settings)

    ids = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(load("whole")(ids).logits, assembled.eval()(ids).logits)
    with pytest.raises(ValueError, match=r"small: leaves out the weights of .*language_model.*complete=True"):
        load("small")
