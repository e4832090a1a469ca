"""transformers' mixins on variants of this model; run by `python -m tests.conformance`, which puts them on the path."""

import unittest

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from llama_smop import LlamaSmopConfig, LlamaSmopForConditionalGeneration, LlamaSmopProcessor
from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig, ProjectorConfig
from llama_smop.models.tokenizer import BOS, EOS, UNKNOWN, add_special_tokens
from llama_smop.models.units import SPECIAL_TOKEN_FIELDS, SPECIAL_TOKENS

WIDTH, LAYERS, HEADS, CLIPS = 16, 2, 2, 2
SECONDS = 0.56  # of sound; the window
FRAMES = 14  # of video
# The words of transformers' tests, and others so that tests may shrink the vocabulary.
SENTENCE = "transcribe speech video to text. and lower newer upper older longer string"
WORDS = [*SENTENCE.split(), *"abcdefghijklmnopqrst"]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A word to a token; the special tokens come first, where a smaller vocabulary still has them."""
    ids = {token: i for i, token in enumerate((BOS, EOS, UNKNOWN, *SPECIAL_TOKENS, *WORDS))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)
    add_special_tokens(tokenizer)
    return tokenizer


class ModelTester:
    """What the mixins ask a model's tester for."""

    batch_size, is_training, hidden_size = CLIPS, True, WIDTH
    num_hidden_layers, num_attention_heads = LAYERS, HEADS

    def __init__(self, modalities=("audio", "video"), kind="smop", ctc_weight=0.0, tied=False):
        self.settings = {"modalities": list(modalities), "ctc_weight": ctc_weight}
        self.kind, self.tied = kind, tied
        self.tokenizer = small_tokenizer()

    def get_config(self) -> LlamaSmopConfig:
        special = self.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        ids = dict(zip(SPECIAL_TOKEN_FIELDS, special, strict=True))
        own = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        pad = {"pad_token_id": ids["pad_token_id"]}
        return LlamaSmopConfig(
            text_config=LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                max_position_embeddings=128,
                tie_word_embeddings=self.tied,
                **own,
                **pad,
            ),
            audio_config=WhisperConfig(
                vocab_size=len(self.tokenizer),
                d_model=WIDTH,
                encoder_layers=LAYERS,
                encoder_attention_heads=HEADS,
                encoder_ffn_dim=WIDTH,
                decoder_layers=1,
                decoder_attention_heads=HEADS,
                decoder_ffn_dim=WIDTH,
                max_source_positions=round(SECONDS * 50),
                decoder_start_token_id=self.tokenizer.bos_token_id,
                **own,
                **pad,
            ),
            video_config=AvHubertVideoConfig(
                frontend_channels=4,
                frontend_stride=4,
                trunk_channels=(4, 8),
                trunk_blocks=(1, 1),
                norm="group",
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=WIDTH,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4,
            ),
            projector_config=ProjectorConfig(kind=self.kind, num_experts=2, top_k=1, hidden_features=WIDTH),
            **ids,
            **own,
            **self.settings,
            freeze_towers=False,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        processor = LlamaSmopProcessor.for_config(config, WhisperFeatureExtractor(), self.tokenizer)
        random = np.random.default_rng(0)
        clips = {
            "audio": [random.standard_normal(round(SECONDS * 16000)).astype(np.float32) for _ in range(CLIPS)],
            "video": [random.standard_normal((FRAMES, 1, 32, 32)).astype(np.float32) for _ in range(CLIPS)],
        }
        inputs = dict(processor(**{name: clips[name] for name in config.modalities}))
        self.seq_length = inputs["input_ids"].shape[1]
        return config, inputs

    @property
    def seq_length(self):
        if not hasattr(self, "_length"):
            self.prepare_config_and_inputs_for_common()
        return self._length

    @seq_length.setter
    def seq_length(self, length):
        self._length = length


class Variant(ModelTesterMixin):
    all_model_classes = (LlamaSmopForConditionalGeneration,)
    all_generative_model_classes = ()  # generation has tests of its own: tests/models/test_generation.py
    _is_composite = True
    settings: dict = {}  # noqa: RUF012

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = ModelTester(**self.settings)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        return inputs | ({"labels": inputs["input_ids"].clone()} if return_labels else {})


class AudioVisual(Variant, unittest.TestCase):
    settings = {}  # noqa: RUF012


class Audio(Variant, unittest.TestCase):
    settings = {"modalities": ("audio",)}  # noqa: RUF012


class Video(Variant, unittest.TestCase):
    settings = {"modalities": ("video",)}  # noqa: RUF012


class Dense(Variant, unittest.TestCase):
    settings = {"kind": "dense"}  # noqa: RUF012


class Ctc(Variant, unittest.TestCase):
    settings = {"modalities": ("audio",), "ctc_weight": 1.0}  # noqa: RUF012


class Tied(Variant, unittest.TestCase):
    settings = {"modalities": ("audio",), "tied": True}  # noqa: RUF012


class Config(unittest.TestCase):
    model_tester = ModelTester()

    def test_config(self):
        # The default's parts are of published sizes, so its own fields are those that can be given alone.
        ConfigTester(
            self, config_class=LlamaSmopConfig, has_text_modality=False, rate_audio=5, compression="stack"
        ).run_common_tests()


class Processor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlamaSmopProcessor

    @classmethod
    def _setup_feature_extractor(cls):
        return WhisperFeatureExtractor()

    @classmethod
    def _setup_tokenizer(cls):
        return small_tokenizer()

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.audio_token, cls.video_token = "<audio></audio>", ""
