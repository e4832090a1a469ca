"""The forms of the projector in a whole model: configured, saved, loaded, trained a step, counted, shown."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llama_smop import LlamaSmopConfig, LlamaSmopForConditionalGeneration, SMoPProjector, estimate
from llama_smop.evaluation.expert_use import expert_activation
from llama_smop.models import card, model_folder
from llama_smop.models.configuration_llama_smop import ProjectorConfig
from llama_smop.models.tiny import build_tiny
from llama_smop.projector_forms import PAPER, SMoPForm
from llama_smop.serve.experts import expert_times
from llama_smop.training.config import ProjectorSection
from tests.models.conftest import WORDS

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 1.0}
TINY_AUDIO = {
    "shared_experts": 1, "input_norm": "rms", "balance": "mse", "router_jitter": 0.01, "activation": "gelu",
    "layer_norm": False,
}  # fmt: skip
SWIGLU = {"gated": True, "activation": "silu", "normalize_weights": False, "weight_scale": 2.5, "shared_experts": 1}
SMEAR = {"merge": "utterance", "balance": "mse", "router": "mlp", "router_hidden": 8, "router_bias": True}


def tiny(**form):
    torch.manual_seed(0)
    return build_tiny(WORDS, **SIZES, **form)


def batch(processor) -> dict:
    g = torch.Generator().manual_seed(0)
    audio = [torch.randn(n, generator=g).numpy() for n in (16000, 9000)]
    video = [torch.randn(n, 1, 88, 88, generator=g) for n in (25, 14)]
    return processor(audio=audio, video=video, text=["bin blue", "now"], return_tensors="pt")


@pytest.mark.parametrize("form", (TINY_AUDIO, SWIGLU, SMEAR), ids=("tiny-audio", "swiglu", "SMEAR"))
def test_a_model_learns_and_survives_being_saved(form, tmp_path):
    model, processor = tiny(**form)
    inputs = batch(processor)
    model.train()
    model(**inputs).loss.backward()
    idle = [n for n, p in model.multi_modal_projector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f"{idle} do not learn"

    loaded = LlamaSmopForConditionalGeneration.from_pretrained(model_folder.save(model, processor, tmp_path / "model"))
    assert loaded.multi_modal_projector.form == model.multi_modal_projector.form != PAPER
    assert loaded.config.projector_config.activation == form.get("activation", "relu")
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_configurations_without_the_options_are_the_papers():
    old = {"model_type": "smop_projector", "kind": "smop", "num_experts": 4, "top_k": 2, "sharing": "DEDR"}
    assert ProjectorConfig(**old).form == PAPER
    assert SMoPForm.of({"kind": "smop"}) == SMoPForm.of(ProjectorSection()) == PAPER


def test_a_training_file_says_what_a_configuration_says():
    """Names and defaults of both, so that none of the options is lost on the way."""
    section = ProjectorSection(**TINY_AUDIO).model_dump()
    assert ProjectorConfig(**section).form == SMoPForm.of(section) == SMoPForm.of(TINY_AUDIO)
    assert set(SMoPForm._fields) <= set(ProjectorSection.model_fields)
    assert {n: f.default for n, f in ProjectorSection.model_fields.items() if n in SMoPForm._fields} == PAPER._asdict()


@pytest.mark.parametrize(
    ("wrong", "says"),
    (
        ({"merge": "utterance"}, r'projector_config.merge="utterance" chooses no experts'),
        ({"input_norm": "batch"}, "projector_config.input_norm must be one of"),
        ({"shared_experts": -1}, "projector_config.shared_experts must be a whole number from 0"),
        ({"kind": "dense", "gated": True}, "gated=True is for kind smop"),
    ),
)
def test_what_is_not_an_option_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        LlamaSmopConfig(projector_config=wrong)


def test_arithmetic_is_counted():
    """As `info` counts it, on tensors without values: forward, and backward of the parameters."""
    D, H, O, E, K, tokens = 16, 12, 8, 4, 2, 20

    def flops(**form) -> int:
        with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=estimate._FLOPS) as counted:
            projector = SMoPProjector(D, H, O, E, K, sharing="DEDR", **form)
            x, modality = torch.zeros(2, tokens // 2, D), torch.zeros(2, tokens // 2, dtype=torch.int64)
            projector(x, modality, modality == 0).hidden_states.sum().backward()
        return counted.get_total_flops()

    first, second = 2 * D * H, 2 * H * O  # of one token and expert; backward has dW1, dW2 and dh
    assert flops(shared_experts=1) - flops() == tokens * (2 * first + 3 * second)
    assert flops(gated=True) - flops() == tokens * K * 2 * first
    merging = 3 * 2 * (2 * 2 * E * (D * H + H + H * O + 3 * O))  # of the parameters, for 2 clips and modalities
    assert flops(merge="utterance", balance=None) < tokens * (2 * first + 3 * second) + merging + 2**15


def test_cards_and_reports_name_the_form():
    config = tiny(**TINY_AUDIO)[0].config
    assert "input_norm='rms'" in card._part(config, "multi_modal_projector")
    _, active = card.parameter_counts(LlamaSmopForConditionalGeneration, config)
    paper = tiny(activation="gelu", layer_norm=False)[0].config
    _, of_the_paper = card.parameter_counts(LlamaSmopForConditionalGeneration, paper)
    assert active - of_the_paper == 2 * 16 * 16 + 32 + 16  # the shared expert and the norm are for every token


def test_figures_of_expert_use_leave_shared_experts_out():
    class Clip(list):
        lengths = (15,)

        def __getitem__(self, index):
            g = torch.Generator().manual_seed(0)
            return {"audio": torch.randn(9600, generator=g).numpy(), "video": torch.randn(15, 1, 88, 88, generator=g)}

    model, processor = tiny(**SWIGLU)
    shares = expert_activation(model.eval(), processor, Clip([0]))["shares"]
    assert len(shares["audio"]) == 8 and sum(shares["audio"]) == pytest.approx(1)
    streams = tuple(Clip()[0].values())
    assert [t.weights.shape[0] for t in expert_times(model, processor, streams, 0.0, 0.6)] == [8, 8]

    model, processor = tiny(**SMEAR)
    assert expert_activation(model.eval(), processor, Clip([0])) is None
    assert expert_times(model, processor, streams, 0.0, 0.6) == []
