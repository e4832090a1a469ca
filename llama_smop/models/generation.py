"""`generate` with speech inputs: towers and projector run once a clip, then the language model alone."""

import torch
from torch import Tensor
from transformers import GenerationMixin

SPEECH_INPUTS = ("input_features", "audio_mask", "video_values", "video_mask")
# Settings under which transformers feeds the prompt's ids again or in parts, without the speech at the placeholders.
BY_IDS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size")


class SpeechGenerationMixin(GenerationMixin):
    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs) -> Tensor:
        """transformers' `generate`; the towers and the projector run once a clip, whatever the number of beams.

        Greedy unless told otherwise. Returns the prompt's ids followed by the new ones, (B, L + new); with
        `inputs_embeds` and no ids the new ones alone.

        Raises:
            ValueError: assisted decoding, a prefill in chunks or a paged cache with speech; an unknown `rate`.
        """
        input_ids = kwargs.pop("input_ids", None)
        input_ids = inputs if input_ids is None else input_ids
        for name in ("labels", "target_positions"):
            kwargs.pop(name, None)
        speech = {k: v for k in SPEECH_INPUTS if (v := kwargs.pop(k, None)) is not None}
        rate = self.config.rate(kwargs.pop("rate", None))
        if speech:
            embeds = kwargs.get("inputs_embeds")
            features = self.get_speech_features(**speech, rate=rate)
            kwargs["inputs_embeds"] = self.place_speech(input_ids, features, embeds)
        if kwargs.get("inputs_embeds") is not None:
            self._refuse_decoding_by_ids(kwargs)
        return super().generate(input_ids=input_ids, **kwargs)

    def _refuse_decoding_by_ids(self, settings: dict) -> None:
        def setting(name: str):
            for source in (settings.get("generation_config"), self.generation_config):
                if name in settings:
                    return settings[name]
                if (value := getattr(source, name, None)) is not None:
                    return value
            return None

        asked = [name for name in BY_IDS if setting(name)]
        asked += ["cache_implementation='paged'"] if setting("cache_implementation") == "paged" else []
        if asked:
            raise ValueError(
                f"generate with speech or inputs_embeds does not go with {', '.join(asked)}: the speech would not be "
                "heard; leave it out"
            )

    def _refresh_generation_config(self) -> None:
        generation = self.generation_config
        generation.do_sample, generation.num_beams = False, 1
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(generation, name, getattr(self.config, name))
