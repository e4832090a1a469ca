"""transformers' `pipeline("automatic-speech-recognition", …)` for this model: `transcribe` on whatever it is handed."""

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from llama_smop.models.clips import check_rate, local_path
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.units import AUDIO_RATE

logger = logging.getLogger(__name__)

TASK = "automatic-speech-recognition"
# Arguments of the call that are `recording.Options`; all others go to `generate`.
OPTIONS = ("modality", "face", "prepared", "aligner", "rate")
FETCH_S = 30  # without an answer, of an address


class LlamaSmopPipeline(AutomaticSpeechRecognitionPipeline):
    """Recordings of any length to `{"text": …}`, the same as `llama-smop transcribe` prints.

    A recording is a file or its address (file://, http://), a video as it is, the bytes of one, an array of mono
    samples at 16 kHz, or a dict of "array" (or "raw") and "sampling_rate"; a list, a generator or a dataset of these.

    Args of the call, or of `pipeline`:
        return_timestamps: True adds "chunks", the pieces that a recording is cut into, each with its "text" and its
            "timestamp" (start, end) in seconds; "word" the words, as `--word-times` of the command line finds them.
        modality: "audio", "video" or "audiovisual"; by default all that the model and the recording have.
        face, prepared, aligner, rate: as `llama_smop.transcription.recording.Options` has them.
        batch_size: recordings that are read, and pieces that are transcribed, together.
        generate_kwargs: settings of `generate`, such as {"num_beams": 5}.
    """

    # transformers would set its own number of beams and of new tokens.
    _pipeline_calls_generate = False

    def __new__(cls, model, *args, **kwargs):
        """For another model transformers' own class, since this one stands in its place for everybody."""
        if isinstance(model.config, LlamaSmopConfig):
            return super().__new__(cls)
        return AutomaticSpeechRecognitionPipeline(model, *args, **kwargs)

    def __init__(self, model, feature_extractor=None, tokenizer=None, processor=None, **kwargs):
        if processor is None:
            processor = self._processor_of(model, feature_extractor, tokenizer)
        parts = {"feature_extractor": processor.feature_extractor, "tokenizer": processor.tokenizer}
        super().__init__(model.eval(), **parts, processor=processor, **kwargs)

    @staticmethod
    def _processor_of(model, feature_extractor, tokenizer) -> LlamaSmopProcessor:
        """That of the model's folder, whose prompts may be its own; else of the parts that transformers has loaded."""
        try:
            commit = getattr(model.config, "_commit_hash", None)
            return LlamaSmopProcessor.from_pretrained(model.name_or_path, revision=commit or "main")
        except (OSError, ValueError):
            if feature_extractor is None or tokenizer is None:
                raise ValueError("a model that was not loaded from a folder needs processor=…") from None
            return LlamaSmopProcessor.for_config(model.config, feature_extractor, tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    # -- transformers' protocol ----------------------------------------------------------------------------------------

    def _sanitize_parameters(
        self, return_timestamps=None, generate_kwargs=None, chunk_length_s=None, stride_length_s=None, **others
    ):
        if return_timestamps not in (None, False, True, "word"):
            raise ValueError(f'return_timestamps must be True, False or "word", got {return_timestamps!r}')
        if others.pop("return_language", None):
            raise ValueError("the model does not say which language it hears: leave out return_language")
        if chunk_length_s or stride_length_s:
            logger.warning("recordings are cut where nobody speaks: chunk_length_s and stride_length_s are not used")
        others.pop("ignore_warning", None)
        options = {name: others.pop(name) for name in OPTIONS if name in others}
        forward = {"options": options} if options else {}
        settings = {**others, **(generate_kwargs or {})}
        if settings:
            forward["settings"] = settings
        if return_timestamps is None:
            return {}, forward, {}
        return {}, forward | {"word_times": return_timestamps == "word"}, {"return_timestamps": return_timestamps}

    def __call__(self, inputs, **kwargs):
        if isinstance(inputs, list) and not inputs:  # transformers looks at the first one
            return []
        return super().__call__(inputs, **kwargs)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        # Not by transformers' DataLoader: recordings differ in length, and `attempts` reads ahead itself.
        if batch_size > 1:
            forward_params = forward_params | {"pieces_at_once": batch_size}
        # A dataset need not say where it ends when it is walked through.
        given = (inputs[i] for i in range(len(inputs))) if isinstance(inputs, Sized) else iter(inputs)
        return self._results(given, batch_size, forward_params, postprocess_params)

    def _results(self, inputs: Iterator, at_once: int, forward: dict, postprocess: dict) -> Iterator[dict]:
        while group := [self.preprocess(given) for given in islice(inputs, at_once)]:
            recordings, rests = zip(*group, strict=True)
            found = self.forward({"recordings": recordings}, **forward)["transcripts"]
            for transcript, rest in zip(found, rests, strict=True):
                yield self.postprocess(transcript, **postprocess) | {name: [value] for name, value in rest.items()}

    def preprocess(self, inputs):
        return _recording(inputs)

    def _forward(self, model_inputs, options=None, settings=None, pieces_at_once=None, word_times=False):
        from llama_smop.transcription.attempts import Transcript, attempts
        from llama_smop.transcription.recording import Options

        settings = dict(settings or {})
        beams = getattr(settings.get("generation_config"), "num_beams", None)
        options = Options(
            **(options or {}),
            num_beams=settings.pop("num_beams", beams or 1),
            pieces_at_once=pieces_at_once,
            word_times=word_times,
            settings=settings,
        )
        transcripts = []
        with TemporaryDirectory() as folder:
            paths, names = [], []
            for number, recording in enumerate(model_inputs["recordings"]):
                in_memory = isinstance(recording, bytes)
                paths.append(Path(folder, str(number)) if in_memory else Path(recording))
                names.append("the recording" if in_memory else recording)
                if in_memory:
                    paths[-1].write_bytes(recording)
            for name, found in zip(names, attempts(paths, self.model, self.processor, options), strict=True):
                if not isinstance(found, Transcript):
                    raise type(found)(name, found.reason) from None
                for line in found.warnings:
                    logger.warning("%s: %s", name, line)
                transcripts.append(found)
        return {"transcripts": transcripts}

    def postprocess(self, model_outputs, return_timestamps=False):
        result = {"text": model_outputs.text}
        if return_timestamps:
            pieces = [piece for piece in model_outputs.pieces if piece.text]
            result["chunks"] = [chunk for piece in pieces for chunk in _chunks(piece, return_timestamps == "word")]
        return result


def _chunks(piece, of_words: bool) -> list[dict]:
    """A piece's words with their times; the piece itself where those are not asked for or could not be found."""
    if of_words and piece.words is not None:
        return [{"text": word.word, "timestamp": (word.start, word.end)} for word in piece.words]
    return [{"text": piece.text, "timestamp": (piece.start, piece.end)}]


# -- what a recording may be -------------------------------------------------------------------------------------------


def _recording(given: Any) -> tuple[str | os.PathLike | bytes, dict]:
    """A path, or the bytes of a file; and what else a dict holds.

    Raises:
        ValueError: something else.
    """
    if isinstance(given, str | os.PathLike):
        address = os.fspath(given)
        return _fetched(address) if address.startswith(("http://", "https://")) else local_path(given), {}
    if isinstance(given, bytes | bytearray):
        return bytes(given), {}
    if hasattr(given, "get_all_samples"):  # torchcodec's AudioDecoder, which datasets hand out
        samples = given.get_all_samples()
        return _sound_file(samples.data, samples.sample_rate), {}
    if not isinstance(given, Mapping):
        return _sound_file(given, AUDIO_RATE), {}
    rest = {k: v for k, v in given.items() if k not in ("array", "raw", "sampling_rate", "path", "bytes")}
    array = given.get("raw") if given.get("array") is None else given["array"]
    if array is not None:
        if given.get("sampling_rate") is None:
            raise ValueError('samples in a dict need their "sampling_rate" in Hz beside them')
        return _sound_file(array, check_rate(given["sampling_rate"])), rest
    file = given.get("path") if given.get("bytes") is None else given["bytes"]
    if file is None:
        raise ValueError(f'a dict must hold "array" (or "raw") and "sampling_rate", "bytes" or "path", got {[*given]}')
    return _recording(file)[0], rest


def _sound_file(samples: Any, rate: int) -> bytes:
    """A .wav of (N,) samples, or of (1, N) or (2, N), whose channels are averaged."""
    import soundfile

    if isinstance(samples, Tensor):
        samples = samples.detach().cpu().float().numpy()
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f":
        what = f"an array of {samples.dtype}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ValueError(f"a recording must be a path, bytes, float samples or a dict with them, got {what}")
    if samples.ndim == 2 and len(samples) in (1, 2):
        samples = samples.mean(axis=0)
    if samples.ndim != 1:
        raise ValueError(f"samples must be mono (N,) or (channels, N) of two channels, got {samples.shape}")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _fetched(address: str) -> bytes:
    from huggingface_hub.utils import httpx

    try:
        answer = httpx.get(address, follow_redirects=True, timeout=FETCH_S)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(f"{address}: cannot be fetched ({' '.join(str(error).split())})") from None
    return answer.content


PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = LlamaSmopPipeline
