"""A model that names its parts, by hub name, in a subfolder, and pushed to a stand-in for the hub."""

import copy
import json
import logging

import pytest
import torch
from huggingface_hub import HfApi

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models import hub, pretrained
from llama_smop.models.assemble import assemble
from tests.golden_files import GOLDEN
from tests.models.hub_server import serve


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


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub whose repositories are folders here."""
    with serve(tmp_path / "hub") as (address, _):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "HfApi", lambda token=None: HfApi(address, token=token or "secret"))
        yield tmp_path / "hub"


FILES = "{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
WAYS = ("push_to_hub", "save_pretrained", "save_pretrained by another name")


@pytest.mark.parametrize("whole", (False, True), ids=("parts elsewhere", "parts on this machine"))
@pytest.mark.parametrize("way", WAYS)
def test_a_pushed_model_is_whole(assembled, tmp_path, remote, monkeypatch, way, whole):
    if not whole:
        monkeypatch.setattr(hub, "is_hub_name", lambda source: True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/private.txt").write_text("not for the hub")
    repository = "user/other" if "another" in way else "mine"
    if way == "push_to_hub":
        assembled.push_to_hub(repository)
    else:
        named = {"repo_id": repository} if "another" in way else {}
        assembled.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, **named)
    pushed = remote / (repository if "/" in repository else f"me/{repository}")
    rows = set() if whole else {pretrained.SPECIAL_TOKENS_FILE}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"} | rows
    assert {f.name for f in pushed.iterdir()} == expected
    assert f"# {repository}\n" in (pushed / "README.md").read_text()
    assert same(LlamaSmopForConditionalGeneration.from_pretrained(pushed), assembled)
    assert (str(GOLDEN) in (pushed / "config.json").read_text()) == (not whole), "names folders that others do not have"
    assert assembled.config.sources, "the model that was pushed has forgotten its sources"


def test_a_card_that_somebody_edited_on_the_hub_stays(assembled, tmp_path, remote):
    card = remote / "me/mine/README.md"
    assembled.push_to_hub("mine", tags=["first"])
    assert "- first" in card.read_text()
    assembled.push_to_hub("mine", tags=["second"])
    assert "- second" in card.read_text()
    edited = card.read_text().replace("## Model", "Our best model so far.\n\n## Model")
    card.write_text(edited)
    assembled.push_to_hub("mine")
    assert card.read_text() == edited
    assembled.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/README.md").write_text("mine")
    assembled.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="mine")
    assert card.read_text() == (tmp_path / "folder/README.md").read_text() == "mine"


def test_a_processor_pushed_first_leaves_no_form_on_the_hub(assembled, pair, remote, monkeypatch):
    """transformers puts its own blank card beside a processor; a word that somebody wrote into it stays."""
    card = remote / "me/mine/README.md"
    here = hub.HfApi()
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", FILES.format(here.endpoint))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: here)
    pair[1].push_to_hub("me/mine")
    form = card.read_text()
    assert "# Model Card for Model ID" in form and (card.parent / "processor_config.json").is_file()
    for words in (
        form.replace("## Uses", "Not for traffic.\n\n## Uses"),
        form + "\nMine.",
        form.replace("This is", "It is"),
    ):
        card.write_text(words)
        assembled.push_to_hub("me/mine")
        assert card.read_text() == words
    card.write_text(form)
    assembled.push_to_hub("me/mine")
    assert "# me/mine\n" in card.read_text() and "Model ID" not in card.read_text()


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
