"""The paper's grid, composed of shipped files: LLM × projector × rates × task."""

from itertools import product

import pytest

from llama_smop.models.configuration_llama_smop import LlamaSmopConfig, ProjectorConfig
from llama_smop.models.lora import lora_settings
from llama_smop.training.config import TrainConfig, read_config

GRID = list(product(("1b", "3b", "8b"), ("jejr", "jedr", "dedr", "dense"), ("4-2", "16-5"), ("asr", "vsr", "avsr")))
TASKS = {"asr": ("audio", 1e-3, 1000), "vsr": ("video", 5e-4, 1500), "avsr": ("audiovisual", 1e-3, 1000)}
ROOT = {"data": {"root": "lrs3"}}
PEFT = {"1b": (64, 8), "3b": (96, 12), "8b": (64, 8)}


def test_there_are_72():
    assert len(GRID) == 72


@pytest.mark.parametrize("llm", ("1b", "3b", "8b"))
def test_every_combination_is_the_recipe(llm):
    for size, sharing, rates, task in GRID:
        if size != llm:
            continue
        config = read_config(["recipe", f"llm/{size}", f"sharing/{sharing}", f"rates/{rates}", f"task/{task}"], ROOT)
        model, optimizer, data = config.model, config.optimizer, config.data
        modality, learning_rate, frames = TASKS[task]
        where = f"{size} {sharing} {rates} {task}"

        assert model.language_model.lower().endswith(f"-{size}"), where
        assert (model.rate_audio, model.rate_video) == tuple(map(int, rates.split("-"))), where
        assert (optimizer.learning_rate, data.max_frames) == (learning_rate, frames), where
        assert [stage.modalities for stage in data.stages] == [{modality: 1}], where
        assert (optimizer.weight_decay, optimizer.betas, optimizer.max_grad_norm) == (0.1, (0.9, 0.98), 10), where
        assert (optimizer.schedule, optimizer.warmup, optimizer.precision) == ("cosine", 0, "bf16"), where
        assert data.buckets == 400 and data.time_mask and set(data.noise.snrs) == {-5, 0, 5, 10, 15, 20, None}, where

        towers = {"audio": model.audio_tower, "video": model.video_tower}
        assert {m for m, tower in towers.items() if tower} == set(model.modalities), where
        assert set(model.modalities) == ({"audio", "video"} if task == "avsr" else {modality}), where
        lora = {part: lora_settings(value) for part, value in model.lora.items()}
        assert (lora["language_model"]["r"], lora["language_model"]["alpha"]) == PEFT[size], where
        assert ("video_tower" in lora) == (task == "vsr"), f"{where}: AV-HuBERT has LoRA for video alone"

        projector = ProjectorConfig(**model.projector.model_dump())
        assert projector.kind == ("dense" if sharing == "dense" else "smop"), where
        assert projector.layer_norm and projector.hidden_features == 2048, where
        if sharing != "dense":
            assert (projector.sharing, projector.num_experts, projector.top_k) == (sharing.upper(), 4, 2), where
        LlamaSmopConfig(  # what the model itself refuses
            projector_config=projector,
            modalities=model.modalities,
            rate_audio=model.rate_audio,
            rate_video=model.rate_video,
            lora=lora,
        )


def test_the_single_file_is_one_of_them():
    parts = ["recipe", "llm/1b", "sharing/dedr", "rates/4-2", "task/avsr"]
    assert read_config("avsr-llama-3.2-1b") == read_config(parts, ROOT)


def test_the_recipe_takes_shards_too():
    parts = ["recipe", "llm/1b", "sharing/dedr", "rates/4-2", "task/vsr"]
    config = read_config(parts, {"data": {"shards": "lrs3-shards"}})
    assert config.data.root is None and config.data.shards == "lrs3-shards"


@pytest.mark.parametrize("where", ({"root": "lrs3"}, {"shards": "lrs3-shards", "root": None, "window": 64}))
def test_a_configuration_written_out_is_read_back(where):
    config = read_config("avsr-llama-3.2-1b", {"data": where})
    assert TrainConfig.model_validate(config.model_dump()) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
