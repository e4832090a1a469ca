"""Gradients accumulated over micro-batches are those of one batch that joins them, router losses included."""

from itertools import chain

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llama_smop.models.tiny import build_tiny
from llama_smop.training.setbacks import Setbacks
from llama_smop.training.trainer import SmopTrainer
from tests.models.conftest import WORDS, chosen, clip

# The clips of the micro-batches are the same, once or twice, so the routers' losses of each are those of the joint
# batch. Their number and the texts' lengths differ: a mean of means weights few and short ones too much.
CLIPS = [clip(40, 1), clip(45, 2)]
TEXTS = (
    ["lay", "set"],
    ["bin blue at f two now", "lay green by g three please again", "place red", "set green now"],
    ["red", "set red now"],
)


def model_and_processor(ctc_weight: float):
    torch.manual_seed(0)
    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}
    coefficients = {"load_balancing_coef": 0.5, "router_z_coef": 0.5}
    return build_tiny(WORDS, max_seconds=2.0, ctc_weight=ctc_weight, **sizes, **coefficients)


def trainer_of(kind, model, folder, steps: int, precision: str):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], gradient_accumulation_steps=steps, bf16=precision == "bf16"
    )
    own = {"plan": None, "setbacks": Setbacks(None, 0, 1)} if kind is SmopTrainer else {}
    return kind(model=model, args=args, **own)


def step(kind, folder, micro_batches, precision: str, ctc_weight: float):
    """(loss, gradient of everything that learns) of one training step over `micro_batches` of texts."""
    model, processor = model_and_processor(ctc_weight)
    trainer = trainer_of(kind, model, folder, len(micro_batches), precision)
    streams = chosen(CLIPS, "audiovisual")
    inputs = []
    for texts in micro_batches:
        repeated = {name: values * (len(texts) // len(CLIPS)) for name, values in streams.items()}
        inputs.append(dict(processor(text=texts, **repeated)))
    batches, items = trainer.get_batch_samples(iter(inputs), len(inputs), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(model, batch, items) for batch in batches)
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return loss.double(), torch.cat(gradients)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize(("kind", "ctc_weight"), ((SmopTrainer, 0.5), (Trainer, 0.0)), ids=("ours", "transformers'"))
def test_accumulated_is_one_joint_batch(kind, ctc_weight, precision, tmp_path):
    joint = [list(chain(*TEXTS))]
    exact = step(kind, tmp_path, joint, "fp32", ctc_weight)
    plain = step(kind, tmp_path, joint, precision, ctc_weight)
    accumulated = step(kind, tmp_path, TEXTS, precision, ctc_weight)
    for name, found, same_precision, truth in zip(("loss", "gradient"), accumulated, plain, exact, strict=True):
        error, rounding = ((t - truth).norm() / truth.norm() for t in (found, same_precision))
        assert error <= 2 * rounding + 1e-5, f"{name}: off by {error:.1e}, rounding alone by {rounding:.1e}"
