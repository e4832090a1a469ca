"""peft on the whole model: LoRA on the projector's stacked parameters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, chosen, clip

CLIPS = [clip(20, 1), clip(25, 2)]
TEXTS = ["bin blue", "set red at"]


@pytest.mark.parametrize("kind", ["smop", "dense"])
@pytest.mark.parametrize("names", [("w1", "w2"), ("w2",)], ids=str)
def test_lora_on_the_projector(kind, names):
    torch.manual_seed(0)
    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 1.0}
    model, processor = build_tiny(WORDS, kind=kind, **sizes)
    batch, prompt = processor(text=TEXTS, **chosen(CLIPS, "audiovisual")), processor(**chosen(CLIPS, "audiovisual"))
    expected = model(**batch).loss.detach()
    targets = [f"multi_modal_projector.{name}" for name in names]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    torch.testing.assert_close(adapted(**batch).loss, expected)  # starts at zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = adapted(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    tokens = adapted.eval().generate(**prompt, max_new_tokens=3)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, max_new_tokens=3), tokens)
