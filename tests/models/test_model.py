"""Training, freezing, LoRA, variants of the projector, and errors of the model."""

import pytest
import torch

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, chosen, clip
from tests.rounding import TINY_MODEL, assert_same_gradients, assert_same_sums

CLIPS = [clip(20, 1), clip(25, 2)]
TEXTS = ["bin blue", "set red at"]


def small(**settings):
    torch.manual_seed(0)
    settings = {"max_seconds": 1.0, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "width": 32} | settings
    return build_tiny(WORDS, **settings)


def variant(model, **changes):
    """The same sizes with a changed config."""
    config = type(model.config)(**model.config.to_dict() | changes)
    torch.manual_seed(0)
    return LlamaSmopForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["smop", "dense"])
def test_it_learns(kind):
    model, processor = small(kind=kind, width=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    losses = []
    for _ in range(30):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.lm_loss.item())
    assert losses[-1] < 0.3 * losses[0], f"{kind}: {losses[0]:.2f} -> {losses[-1]:.2f}"
    prompt = processor(**chosen(CLIPS, "audiovisual"))
    texts = processor.decode_new(model.eval().generate(**prompt, max_new_tokens=5), prompt["input_ids"].shape[1])
    assert texts == TEXTS


def test_loss_is_the_sum_of_its_parts(model, processor):
    output = model(**processor(text=TEXTS, **chosen(CLIPS, "audiovisual")))
    parts = (
        output.lm_loss
        + 0.01 * output.load_balancing_loss
        + 0.001 * output.router_z_loss
        + model.config.ctc_weight * output.ctc_loss
    )
    assert_same_sums(output.loss, parts, 4, "the loss")


def test_every_trainable_parameter_gets_a_gradient(model, processor):
    model(**processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    assert without == []


def test_frozen_towers_stay_in_eval_and_get_no_gradient():
    model = variant(small()[0], freeze_towers=True).train()
    assert model.language_model.training
    assert not any(m.training for t in model.towers.values() for m in t.modules())
    assert not any(p.requires_grad for t in model.towers.values() for p in t.parameters())


def test_tower_batch_norm_train_moves_the_statistics_only_when_asked():
    base, processor = small(modalities=("video",))
    video = base.config.video_config.to_dict() | {"norm": "batch"}
    batch = processor(text=TEXTS, **chosen(CLIPS, "video"))
    for asked in (False, True):
        model = variant(base, video_config=video, freeze_towers=True, tower_batch_norm_train=asked).train()
        before = model.video_tower.frontend.norm.running_mean.clone()
        model(**batch)
        assert torch.equal(before, model.video_tower.frontend.norm.running_mean) != asked


def test_lora_starts_at_zero_and_trains_alone():
    base, processor = small(modalities=("video",))
    lora = {"language_model": {"r": 4, "alpha": 8}, "video_tower": {"r": 2, "alpha": 4}}
    model = variant(base, lora=lora, freeze_towers=True, ctc_weight=0)
    missing, unexpected = model.load_state_dict(
        {
            (
                k.replace("_proj.", "_proj.base_layer.")
                if k.replace("_proj.", "_proj.base_layer.") in model.state_dict()
                else k
            ): v
            for k, v in base.state_dict().items()
            if "ctc" not in k
        },
        strict=False,
    )
    assert not unexpected
    assert all("lora_" in k for k in missing)
    batch = processor(text=TEXTS, **chosen(CLIPS, "video"))
    with torch.no_grad():
        assert_same_sums(model.eval()(**batch).logits, base.eval()(**batch).logits, TINY_MODEL, "the logits")
    model.train()(**batch).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in n or n.startswith("multi_modal_projector.") for n in trained)
    assert any(n.startswith("video_tower.") for n in trained)
    assert any(n.startswith("language_model.") for n in trained)


def test_published_lora_start_is_not_zero():
    base, _ = small(modalities=("audio",))
    model = variant(base, lora={"language_model": {"r": 4, "alpha": 8, "init": "normal"}})
    factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert factors
    assert all(0.01 < p.std() < 0.04 for p in factors)


@pytest.mark.parametrize("sharing", ["JEJR", "JEDR", "DEDR"])
@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_every_sharing_takes_every_modality(sharing, modality):
    model, processor = small(sharing=sharing)
    output = model(**processor(text=TEXTS, **chosen(CLIPS, modality)))
    assert output.loss.isfinite()
    if sharing == "DEDR" and modality != "audiovisual":
        audio, video = output.expert_counts.view(2, -1).sum(1)
        assert (audio > 0, video > 0) == (modality == "audio", modality == "video")


@pytest.mark.parametrize("kind", ["smop", "dense"])
def test_stacked_tokens_of_different_widths_are_filled_up_with_zeros(kind):
    model, processor = small(compression="stack", kind=kind)
    assert model.multi_modal_projector.in_features == 4 * 32
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    before = model.eval()(**batch).logits
    with torch.no_grad():
        model.multi_modal_projector.w1.view(2, -1, *model.multi_modal_projector.w1.shape[1:])[1, :, :, 64:] += 1.0
    assert_same_sums(model(**batch).logits, before, TINY_MODEL, "the logits, of no other columns,")


def test_one_modality_makes_one_tower_and_one_router():
    model, processor = small(modalities=("audio",))
    assert not hasattr(model, "video_tower")
    assert model.multi_modal_projector.gate_weight.shape[0] == 1
    with pytest.raises(ValueError, match="no video tower"):
        model(**processor(text=TEXTS, **chosen(CLIPS, "video")))


def test_gradient_checkpointing_changes_no_gradient():
    model, processor = small()
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    model.train()(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, TINY_MODEL)


def test_bfloat16(processor):
    model = small()[0].bfloat16()
    output = model(**small()[1](text=TEXTS, **chosen(CLIPS, "audiovisual")), skip_logits=False)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.logits.dtype == torch.bfloat16


def test_errors_say_what_was_expected(model, processor):
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    with pytest.raises(ValueError, match="placeholders"):
        model(**dict(batch) | {"audio_mask": torch.ones_like(batch["audio_mask"])})
    with pytest.raises(ValueError, match="audio_mask is required"):
        model(**{k: v for k, v in batch.items() if k != "audio_mask"})
    with pytest.raises(ValueError, match=r"video_mask must be \(B, T\)"):
        model(**dict(batch) | {"video_mask": batch["video_mask"][:, :-2]})
    with pytest.raises(ValueError, match=r"video_values must be \(B, T, 1, H, W\)"):
        model(**dict(batch) | {"video_values": batch["video_values"][:, :, 0]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ["smell"]}, "modalities must be"),
        ({"modalities": []}, "modalities must be"),
        ({"compression": "squeeze"}, "one of pool, stack, got 'squeeze'"),
        ({"rate_audio": 0}, "rate_audio must be a whole number from 1 to 1000, got 0"),
        ({"projector_config": {"top_k": 5}}, r"\[1, 4\], got 5"),
        ({"projector_config": {"sharing": "JDJD"}}, "one of JEJR, JEDR, DEDR, got 'JDJD'"),
        ({"projector_config": {"kind": "mlp"}}, "one of smop, dense, got 'mlp'"),
        ({"projector_config": {"activation": "tanh"}}, "activation"),
        ({"projector_config": {"sharing": "JEJR"}, "compression": "stack"}, "one width, got 128 and 64"),
        ({"lora": {"projector": {"r": 1, "alpha": 1}}}, "language_model and video_tower"),
        ({"audio_token_id": 10**6}, "outside the language model's vocabulary"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    config = small()[0].config
    with pytest.raises(ValueError, match=message):
        type(config)(**config.to_dict() | changes)


@pytest.mark.parametrize(
    ("lora", "message"),
    [("llama-9", "unknown LoRA preset"), ({"r": 4}, "r, alpha"), ({"r": 0, "alpha": 1}, "at least 1")],
)
def test_lora_settings_are_checked(lora, message):
    with pytest.raises(ValueError, match=message):
        variant(small(modalities=("audio",))[0], lora={"language_model": lora})


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_a_model_of_one_modality_has_one_router_entropy(modality):
    model, processor = small(modalities=(modality,))
    entropy = model(**processor(text=TEXTS, **chosen(CLIPS, modality))).router_entropy
    assert entropy.shape == (1,)
    assert 0 < entropy.item() <= torch.tensor(4.0).log()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("atention_mask", "attention_mask"), ("video_value", "video_values"), ("skip_logit", "skip_logits")],
)
def test_a_misspelt_keyword_is_refused(model, processor, name, meant):
    batch = processor(text=TEXTS, **chosen(CLIPS, "audio"))
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; did you mean '{meant}'"):
        model(**batch, **{name: torch.ones(2, 3)})


def test_the_language_models_own_keywords_are_taken(model, processor):
    batch = processor(text=TEXTS, **chosen(CLIPS, "audio"))
    output = model(**batch, output_hidden_states=True, num_items_in_batch=2)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
