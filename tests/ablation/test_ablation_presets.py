"""The shipped grids: every form in them trains and is scored."""

import pytest
import torch

from llama_smop.ablation.cell import score_rows
from llama_smop.ablation.grid import ScoreSection, cells, read_grid
from llama_smop.data.training_plan import Draw
from llama_smop.training import build
from llama_smop.training.compose import Composition, shipped
from llama_smop.training.config import TrainConfig

PRESETS = [name for name in shipped() if name.startswith("ablation/")]
SMALL = {
    "model": {
        "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
        "projector": {"hidden_features": 16},
    },
    "data": {"keep_decoded": False},
    "optimizer": {"steps": 2, "warmup": 0},
}


def planned(preset, corpus):
    """A cell of every name, of the first seed, and its training's configuration made small."""
    grid, beside = read_grid(preset)
    for cell in cells(grid, beside, corpus):
        if cell.seed == 0:
            composition = Composition()
            composition.add(cell.config.model_dump(exclude_unset=True), cell.name)
            composition.add(SMALL, "small")
            yield cell, composition.check(TrainConfig)


def test_there_are_grids_of_sharings_forms_and_rates():
    assert {"ablation/sharing", "ablation/forms", "ablation/rates"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_of_a_preset_trains(preset, shared_corpus):
    """Two steps at each rate make the loss of a batch smaller, and everything in the projector takes part."""
    found = list(planned(preset, shared_corpus))
    assert len({cell.name for cell, _ in found}) == len(found) >= 3
    for cell, config in found:
        torch.manual_seed(0)
        clips = build.training_clips(config)
        model, processor = build.build_model(config, clips.source.texts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        collate = build.Collator(processor)
        rates = config.model.rates or (None,)
        batches = [collate([clips[Draw(i, 0, "audiovisual", True, rate)] for i in range(2)]) for rate in rates]
        losses = []
        for _ in range(3):
            total = 0.0
            for batch in batches:
                outputs = model(**{key: value for key, value in batch.items() if key != "bad_clips"})
                outputs.loss.backward()
                total += outputs.loss.item()
            losses.append(total)
            idle = [n for n, p in model.multi_modal_projector.named_parameters() if p.grad is None]
            assert not idle, f"{cell.name}: no gradient for {idle}"
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0], f"{cell.name}: {losses}"


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_of_a_preset_is_trained_and_scored_as_the_command_does(preset, shared_corpus, tmp_path):
    from llama_smop.models import model_folder
    from llama_smop.training.run import train

    for cell, config in planned(preset, shared_corpus):
        loaded = model_folder.load(train(config, tmp_path / cell.name), "cpu")
        rows = score_rows(*loaded, config, ScoreSection(modalities=("audiovisual",), snrs=(None,)))
        assert len(rows) == len(config.model.rates or (None,)), cell.name
