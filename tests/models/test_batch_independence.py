"""A clip's logits, losses and transcript are the same alone and among longer clips, on either padding side."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from llama_smop.models.units import streams_of
from tests.models.conftest import chosen, clip
from tests.rounding import TINY_MODEL, assert_same_sums

CLIPS = [clip(31, 1), clip(17, 2), clip(26, 3)]
TEXTS = ["bin blue at f two now", "set red", "lay green by g three please again"]
MODALITIES = ["audio", "video", "audiovisual"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("modality", MODALITIES)
@torch.no_grad()
def test_logits_and_losses(model, processor, modality, side):
    def run(indices):
        batch = processor(
            text=[TEXTS[i] for i in indices], padding_side=side, **chosen([CLIPS[i] for i in indices], modality)
        )
        return batch, model(**batch)

    batch, together = run([0, 1, 2])
    losses, counts, router_logits = [], [], []
    for i in range(3):
        alone_batch, alone = run([i])
        real, real_alone = batch["attention_mask"][i].bool(), alone_batch["attention_mask"][0].bool()
        what = f"with its batch, clip {i}'s logits: the difference"
        assert_same_sums(together.logits[i][real], alone.logits[0][real_alone], TINY_MODEL, what)
        labels = alone_batch["labels"][0, 1:]
        losses.append(cross_entropy(alone.logits[0, :-1], labels, reduction="sum"))
        counts.append((labels != -100).sum())
        router_logits.append(alone.router_logits.flatten(0, 1))
        assert torch.equal(alone.expert_counts.sum(), torch.tensor(2 * len(router_logits[-1])))
    assert_same_sums(together.lm_loss, sum(losses) / sum(counts), TINY_MODEL, "the loss")
    # The auxiliary losses of the batch are those of its real tokens, each modality by itself.
    z = _mean_over_modalities(model, router_logits, CLIPS, modality)
    assert_same_sums(together.router_z_loss, z, TINY_MODEL, "the router's z-loss")
    assert together.expert_counts.sum() == 2 * sum(len(r) for r in router_logits)


def _mean_over_modalities(model, router_logits, clips, modality):
    per_modality = {m: [] for m in streams_of(modality)}
    for logits, (audio, _) in zip(router_logits, clips, strict=True):
        n_audio = max(len(audio) * 50 // 16000, 25) // model.config.rate_audio if "audio" in per_modality else 0
        for m, part in (("audio", logits[:n_audio]), ("video", logits[n_audio:])):
            if m in per_modality:
                per_modality[m].append(part.logsumexp(-1) ** 2)
    return sum(torch.cat(parts).mean() for parts in per_modality.values()) / len(per_modality)


@pytest.mark.parametrize("beams", [1, 3])
def test_transcripts(model, processor, beams):
    # No early end, so that an untrained model has something to disagree about.
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams}
    together = model.generate(**processor(**chosen(CLIPS, "audiovisual"), do_normalize=False), **settings)[:, -6:]
    for i, one in enumerate(CLIPS):
        alone = model.generate(**processor(**chosen([one], "audiovisual"), do_normalize=False), **settings)[:, -6:]
        assert torch.equal(alone[0], together[i])
    assert len(together.unique()) > 1


def test_generation_is_the_argmax_of_forward(model, processor):
    """Prefill with cached keys and positions from the mask agree with one long forward."""
    batch = processor(**chosen(CLIPS, "audiovisual"))
    ids = model.generate(**batch, max_new_tokens=4, min_new_tokens=4)
    prompt = batch["input_ids"].shape[1]
    ones = torch.ones(3, ids.shape[1] - prompt, dtype=torch.long)
    full = dict(batch) | {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], ones], 1)}
    with torch.no_grad():
        logits = model(**full).logits[:, prompt - 1 : -1]
    logits[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, prompt:])


def test_towers_run_once_whatever_the_number_of_beams(model, processor):
    calls = []
    handles = [
        tower.register_forward_hook(lambda m, i, o: calls.append(len(o.last_hidden_state)))
        for tower in model.towers.values()
    ]
    model.generate(**processor(**chosen(CLIPS[:2], "audiovisual")), max_new_tokens=3, num_beams=4)
    for handle in handles:
        handle.remove()
    assert calls == [2, 2]


def test_padding_gets_no_gradient(model, processor):
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    batch["video_values"].requires_grad_()
    model(**batch).loss.backward()
    gradient, real = batch["video_values"].grad, batch["video_mask"]
    assert (gradient[~real] == 0).all()
    assert (gradient[real].flatten(1).abs().sum(1) > 0).all()
    model.zero_grad()
