"""LoRA goes to peft's adapter folders and back, and into the weights."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.cli import main
from llama_smop.models import adapters, model_folder
from llama_smop.models.assemble import assemble
from llama_smop.models.tiny import build_tiny
from tests.golden_files import GOLDEN
from tests.models.conftest import WORDS, chosen, clip

BASE = GOLDEN / "full_model/llm_hf"
CLIPS = [clip(20, 1), clip(25, 2)]
LORA = {"r": 4, "alpha": 3, "init": "normal"}
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 1.0}


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with LoRA whose base model and Whisper are elsewhere."""
    torch.manual_seed(0)
    model, processor = assemble(
        language_model=BASE,
        audio_tower=GOLDEN / "whisper/hf_model",
        projector={"hidden_features": 16},
        lora={"language_model": LORA},
    )
    return model_folder.save(model, processor, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def model(saved):
    return model_folder.load(saved, "cpu")[0]


@pytest.fixture
def ids():
    return torch.randint(0, base().config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))


def scratch(lora: dict):
    """A whole model without sources; LoRA by part."""
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, **SIZES)
    config = type(model.config)(**model.config.to_dict() | {"lora": lora})
    return LlamaSmopForConditionalGeneration(config).eval(), processor


@torch.no_grad()
def test_peft_loads_the_adapter_onto_the_base(saved, model, ids, tmp_path):
    main(["adapter", "export", "--model", str(saved), "--to", str(tmp_path / "adapter")])
    language_model = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    without = base()(ids).logits
    logits = language_model(ids).logits
    torch.testing.assert_close(logits, model(ids).logits[..., : logits.shape[-1]])
    assert not torch.allclose(logits, without, atol=1e-3), "the adapter does nothing"
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(BASE) and settings["task_type"] == "CAUSAL_LM"


@torch.no_grad()
def test_of_the_video_tower(tmp_path):
    model, processor = scratch({"video_tower": LORA})
    adapters.export_adapter(model, tmp_path / "adapter", "video_tower")
    bare = copy.deepcopy(model.video_tower)
    adapters.remove_lora(bare)
    frames = processor(**chosen(CLIPS, "video"))["video_values"]
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(frames).last_hidden_state, model.video_tower(frames).last_hidden_state)


def peft_adapter(folder, **settings):
    """The folder of an adapter that peft itself made, and the logits of the base with it."""
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    adapted = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"r": 7, "target_modules": ["o_proj", "up_proj", "down_proj"]},
        {"target_modules": r".*layers\.1\..*(q|k)_proj"},
        {"target_modules": "all-linear", "lora_dropout": 0.3, "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    ),
    ids=str,
)
def test_an_adapter_of_peft_is_imported(saved, ids, tmp_path, settings):
    expected = peft_adapter(tmp_path / "adapter", **settings)(ids).logits
    main(["adapter", "import", str(tmp_path / "adapter"), "--model", str(saved), "--to", str(tmp_path / "new")])
    model, _ = model_folder.load(tmp_path / "new", "cpu")
    torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected)
    trained = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    adapters.export_adapter(model, tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), str(tmp_path / "again"))(ids).logits, expected)


@torch.no_grad()
def test_onto_a_language_model_that_was_trained_itself(ids, tmp_path):
    """Its weights are saved with the model, although its configuration named a source for them."""
    model, processor = assemble(
        language_model=BASE, audio_tower=GOLDEN / "whisper/hf_model", projector={"hidden_features": 16}
    )
    for weight in model.language_model.parameters():
        weight.mul_(1.1)
    peft_adapter(tmp_path / "adapter")
    expected = adapters.import_adapter(model.eval(), tmp_path / "adapter")(ids).logits
    model_folder.save(model, processor, tmp_path / "model")
    torch.testing.assert_close(model_folder.load(tmp_path / "model", "cpu")[0](ids).logits, expected)


def changed(folder, **settings):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


def of_other_width(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value[:, :-1].contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors"
    )


def not_finite(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "adapter_model.safetensors")


def of_another_base(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name.replace("self_attn", "attention"): value for name, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")


def half(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: v for n, v in weights.items() if "lora_A" in n}, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    peft_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def unharmed(saved):
    """A model that refusals leave as it is, which each checks."""
    return model_folder.load(saved, "cpu")[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    (
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter here"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter here"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged, no JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"is an adapter of kind \[\]"),
        (lambda folder: changed(folder, peft_type="IA3"), "is an adapter of kind 'IA3'"),
        (lambda folder: changed(folder, use_dora=True), "uses use_dora of peft"),
        (lambda folder: changed(folder, alpha_pattern={"q_proj": 3}), "uses alpha_pattern"),
        (lambda folder: changed(folder, init_lora_weights="pissa"), "uses init_lora_weights"),
        (lambda folder: changed(folder, r="x"), "LoRA r must be a whole number"),
        (lambda folder: changed(folder, r=3), r"lora_A.weight is \(2, .* there, and \(3, .* here"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 50), "header"),
        (of_other_width, "does not fit this model's language_model: "),
        (of_another_base, r"is for a module model\.layers\.0\.attention\.q_proj, which this model does not have"),
        (half, "lora_B.weight is none there"),
        (not_finite, "holds NaN or infinity"),
    ),
)
def test_what_is_no_adapter_of_this_model_is_refused(of_peft, unharmed, tmp_path, damage, message):
    before, folder = {n: v.clone() for n, v in unharmed.state_dict().items()}, tmp_path / "adapter"
    shutil.copytree(of_peft, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        adapters.import_adapter(unharmed, folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    after = unharmed.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_a_refused_adapter_leaves_no_folder(saved, tmp_path):
    with pytest.raises(SystemExit, match="no adapter here"):
        main(["adapter", "import", str(tmp_path), "--model", str(saved), "--to", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_nothing_to_export(tmp_path):
    model, _ = scratch({"video_tower": LORA})
    for part, message in (
        ("language_model", r"no LoRA in its language_model \(only in video_tower\)"),
        ("audio_tower", "language_model or video_tower"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.export_adapter(model, tmp_path / "adapter", part)
    assert not (tmp_path / "adapter").exists()


@torch.no_grad()
def test_merged_weights_give_the_same_logits(saved, model, ids, tmp_path):
    main(["merge", "--model", str(saved), "--to", str(tmp_path / "merged")])
    merged, _ = model_folder.load(tmp_path / "merged", "cpu")
    expected = model(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not any("lora" in name for name in merged.state_dict())
    assert merged.config.sources == {"audio_tower": model.config.sources["audio_tower"]}


@torch.no_grad()
def test_merged_in_every_part(tmp_path):
    lora = {"language_model": {**LORA, "targets": ["q_proj", "down_proj"]}, "video_tower": LORA}
    model, processor = scratch(lora)
    batch = processor(**chosen(CLIPS, "audiovisual"))
    expected = model(**batch).logits
    merged = adapters.merge_lora(model)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    model_folder.save(merged, processor, tmp_path / "merged")
    again, _ = model_folder.load(tmp_path / "merged", "cpu")
    assert torch.equal(again(**batch).logits, merged(**batch).logits)


def test_what_cannot_be_merged_is_refused_whole(model, ids):
    bare, _ = scratch({})
    with pytest.raises(ValueError, match="no LoRA, so there is nothing to merge"):
        adapters.merge_lora(bare)
    tied, _ = scratch({"language_model": {**LORA, "targets": ["q_proj", "embed_tokens"]}})
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    with pytest.raises(ValueError, match="embed_tokens: LoRA cannot be folded into an embedding that is also the head"):
        adapters.merge_lora(tied)
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())
