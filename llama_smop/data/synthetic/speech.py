"""Synthetic speech with phoneme times, by espeak-ng through the `espeakng-loader` wheel (extra `[corpus]`).

espeak-ng keeps its synthesis state (pitch flutter, filters) in static variables, so what it says depends on what it
said before. `speak` therefore loads a fresh copy of the library for every sentence and unloads it afterwards: about
5 ms, and the samples depend on the arguments alone. Only voices with a `breath` setting (`+f2`, `+f3`, `+f5`) still
differ from time to time; the corpus does not use them.
"""

import _ctypes
import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SYNCHRONOUS = 2
_PHONEME_EVENTS = 1
_CHARS_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_EVENT_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7

_one_at_a_time = threading.Lock()


class SpeechError(RuntimeError):
    """Speech could not be synthesised."""


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Segment:
    """A phoneme (espeak mnemonic, `_` for a pause) or a word, with its times in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """The result of `speak`: int16 samples at `rate` Hz, phonemes and words in order of time."""

    samples: np.ndarray
    rate: int
    phonemes: tuple[Segment, ...]
    words: tuple[Segment, ...]


def _paths() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError:
        raise SpeechError(
            "espeak-ng is needed to make a talking corpus and is not installed: pip install 'llama-smop[corpus]'"
        ) from None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def speak(text: str, voice: str = "gmw/en-US", words_per_minute: int = 175, pitch: int = 50, range: int = 50) -> Speech:
    """Says `text` and tells when each phoneme and word was said.

    voice: espeak identifier with an optional variant, such as `gmw/en-US+m3`. pitch, range: 0 to 100, espeak's own
    scale. Raises SpeechError if the wheel is missing, the voice is unknown or nothing came out.
    """
    library_path, data_path = _paths()
    language, _, variant = voice.partition("+")
    if not Path(data_path, "lang", language).is_file() or (
        variant and not Path(data_path, "voices/!v", variant).is_file()
    ):
        # espeak-ng would speak with another voice and say nothing about it
        raise SpeechError(f"espeak-ng has no voice {voice!r}; examples: gmw/en-US, gmw/en-GB-x-rp+m3")
    chunks: list[np.ndarray] = []
    events: list[tuple[int, int, int, str]] = []

    @_Callback
    def collect(samples, count, event):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type != _EVENT_END:
            kind = event[i].type
            name = event[i].id.string.decode("utf-8", "replace") if kind == _EVENT_PHONEME else ""
            events.append((kind, event[i].sample, event[i].text_position, name))
            i += 1
        return 0

    with _one_at_a_time:
        library = ctypes.CDLL(library_path)
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _PHONEME_EVENTS)
            if rate <= 0:
                raise SpeechError(f"espeak-ng could not read its data in {data_path}: reinstall espeakng-loader")
            library.espeak_SetSynthCallback(collect)
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise SpeechError(f"espeak-ng cannot speak as {voice!r}")
            for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_PITCH_RANGE, range)):
                library.espeak_SetParameter(parameter, int(value), 0)
            encoded = text.encode()
            library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _CHARS_UTF8, None, None)
            library.espeak_Synchronize()
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)

    if not any(kind == _EVENT_PHONEME and not name.startswith("_") for kind, _, _, name in events):
        raise SpeechError(f"espeak-ng said nothing for {text!r}")
    samples = np.concatenate(chunks)
    return Speech(samples, rate, *_segments(text, events, rate, len(samples)))


def _segments(text: str, events: list, rate: int, total: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    heard = [
        (sample / rate, "_" if name.startswith("_") else name) for k, sample, _, name in events if k == _EVENT_PHONEME
    ]
    ends = [start for start, _ in heard[1:]] + [total / rate]
    phonemes = tuple(Segment(name, start, end) for (start, name), end in zip(heard, ends, strict=True))
    speech_end = max((p.end for p in phonemes if p.name != "_"), default=total / rate)

    starts: dict[int, float] = {}
    for kind, sample, position, _ in events:
        if kind == _EVENT_WORD:  # espeak counts characters from 1
            starts.setdefault(text[: position - 1].count(" "), sample / rate)
    spoken = text.split(" ")
    order = [i for i in sorted(starts) if i < len(spoken)]
    words = []
    for i, following in zip(order, [*order[1:], None], strict=True):
        end = speech_end if following is None else starts[following]
        words.append(Segment(spoken[i], starts[i], end))
    return phonemes, tuple(words)
