"""transformers' own Trainer on the model: evaluation, the best checkpoint, label smoothing."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, chosen, clip

CLIPS = [(clip(20 + 3 * i, i), text) for i, text in enumerate(("bin blue", "set red at by", "place please", "lay"))]


def trainer(folder, metrics=None, steps=2, **settings):
    torch.manual_seed(0)
    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 2.0}
    without = ("ctc_weight", "load_balancing_coef", "router_z_coef")
    model, processor = build_tiny(WORDS, **sizes, **{k: settings.pop(k) for k in without if k in settings})
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=steps,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )

    def collate(items):
        clips, texts = zip(*items, strict=True)
        return dict(processor(text=list(texts), **chosen(clips, "audiovisual")))

    data = {"train_dataset": CLIPS, "eval_dataset": CLIPS}
    return Trainer(model=model, args=arguments, data_collator=collate, compute_metrics=metrics, **data), collate


def test_evaluation_has_a_loss_and_its_metrics_see_the_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        keep = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": np.mean(right[keep])}

    found, collate = trainer(tmp_path, metrics)
    scores = found.evaluate()
    with torch.no_grad():
        losses = [found.model.eval()(**collate(CLIPS[i : i + 2])).loss.item() for i in (0, 2)]
    assert scores["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert 0 <= scores["eval_accuracy"] <= 1
    assert seen[0].predictions.shape[0] == len(CLIPS) and seen[0].predictions.ndim == 3


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    rhythm = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    found, _ = trainer(tmp_path, load_best_model_at_end=True, learning_rate=1e-3, steps=3, **rhythm)
    found.train()
    best = found.state.best_metric
    assert best == min(row["eval_loss"] for row in found.state.log_history if "eval_loss" in row)
    assert found.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_label_smoothing_is_on_the_next_token(tmp_path):
    """Without auxiliary losses and almost without smoothing it is the model's own loss."""
    alone = {"ctc_weight": 0.0, "load_balancing_coef": 0.0, "router_z_coef": 0.0}
    found, collate = trainer(tmp_path, label_smoothing_factor=1e-9, **alone)
    batch = collate(CLIPS[:2])
    with torch.no_grad():
        expected = found.model.eval()(**batch).loss
        torch.testing.assert_close(found.compute_loss(found.model, dict(batch)), expected, rtol=1e-5, atol=0)


def test_a_loss_made_elsewhere_lacks_the_auxiliary_ones_and_a_warning_says_so(tmp_path, caplog):
    found, collate = trainer(tmp_path, label_smoothing_factor=0.1)
    batch = collate(CLIPS[:2])
    found.compute_loss(found.model.eval(), dict(batch))
    assert not caplog.records
    found.compute_loss(found.model.train(), dict(batch))
    found.compute_loss(found.model, dict(batch))
    (record,) = caplog.records
    assert "CTC" in record.message and "label_smoothing_factor" in record.message
