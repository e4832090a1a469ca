"""Compression rates of one model: pairs (audio, video) of how many tower frames make a token, and their projectors.

A model for several rates draws one for each batch of its training and takes any of them later, as Omni-AVSR does
(arXiv 2511.07253). Its public code averages neighbouring frames or concatenates them. Averages are equally wide at
every rate, and go through a projector for each rate or through one for all. Concatenations are wider at a higher rate
and always go through a projector for each. `rate_projectors` offers the same, for pairs of rates: Omni-AVSR draws the
rates of audio and video independently, and its projectors are for one of them.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from llama_smop.models import config_checks as check
from llama_smop.models.units import VIDEO_RATE, WHISPER_RATE, streams_of

Rate = tuple[int, int]  # frames of audio, of video in a token
DEFAULT: Rate = (4, 2)
BOUNDS = (1, 1000)
MOST = 32  # rates of one model


def rate_text(rate: Sequence[int]) -> str:
    """A rate as commands and records write it: (16, 5) is "16,5"."""
    return ",".join(map(str, rate))


def rate_parsed(text: str) -> Rate:
    """Raises ValueError: no two whole numbers with a comma between them."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and len(part) < 9 for part in parts):
        raise ValueError(f"a rate is frames of audio, of video in a token, such as 16,5; got {text!r:.60}")
    return int(parts[0]), int(parts[1])


def chosen_rate(known: Sequence[Rate], asked: str | Sequence[int] | None) -> Rate:
    """The rate asked for, None being the first known.

    Raises:
        ValueError: a rate that is not known, in one line with those that are.
    """
    if asked is None:
        return known[0]
    rate = rate_parsed(asked) if isinstance(asked, str) else asked
    rate = tuple(rate) if isinstance(rate, list | tuple) else rate
    if rate not in known:
        given = rate_text(rate) if isinstance(rate, tuple) else repr(rate)
        verb = "rates of this model are" if len(known) > 1 else "only rate of this model is"
        names = " and ".join(map(rate_text, known))
        raise ValueError(f"the {verb} {names} (frames of audio, of video in a token), got {given:.60}")
    return known[known.index(rate)]


def check_rates(config: Any, part: str = "") -> None:
    """Check `rates`, `rate_audio` and `rate_video` of a configuration or processor, and make them agree.

    The first of `rates` is the default, which `rate_audio` and `rate_video` say. A single one is no list.

    Raises:
        ValueError: rates that are no pairs of whole numbers, that repeat, or that disagree with the default.
    """
    check.whole(config, part, rate_audio=BOUNDS, rate_video=BOUNDS)
    if config.rates is None:
        return
    pairs = config.rates if isinstance(config.rates, list | tuple) else []
    listed = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in pairs]
    whole = all(len(pair) == 2 and all(_within(number) for number in pair) for pair in listed)
    if not 1 <= len(listed) <= MOST or not whole or len(set(listed)) < len(listed):
        raise ValueError(
            f"{part}rates must be a list of 1 to {MOST} different pairs (audio, video) of whole numbers from "
            f"{BOUNDS[0]} to {BOUNDS[1]}, got {config.rates!r:.60}"
        )
    default = config.rate_audio, config.rate_video
    if default not in (DEFAULT, listed[0]):
        raise ValueError(
            f"{part}rate_audio and rate_video are {default[0]} and {default[1]}, and rates begin with "
            f"{rate_text(listed[0])}, which is the default: leave rate_audio and rate_video out"
        )
    config.rate_audio, config.rate_video = listed[0]
    config.rates = [list(pair) for pair in listed] if len(listed) > 1 else None


def _within(number: object) -> bool:
    return isinstance(number, int) and check.is_whole(number) and BOUNDS[0] <= number <= BOUNDS[1]


def known_rates(config: Any) -> tuple[Rate, ...]:
    """The rates of a checked configuration or processor, the default first."""
    pairs = config.rates or [(config.rate_audio, config.rate_video)]
    return tuple((audio, video) for audio, video in pairs)


def tokens_a_second(rate: Rate, modality: str) -> float:
    """Speech tokens that a second of "audio", "video" or "audiovisual" makes: 50 / audio + 25 / video."""
    frames = {"audio": (WHISPER_RATE, rate[0]), "video": (VIDEO_RATE, rate[1])}
    return sum(frames[stream][0] / frames[stream][1] for stream in streams_of(modality))


class RateProjectors(nn.ModuleDict):
    """A projector for each rate. Parameters of that for (16, 5) are named `16_5.w1` and so on."""

    def at(self, rate: Rate) -> nn.Module:
        return self["_".join(map(str, rate))]

    @classmethod
    def of(cls, projectors: dict[Rate, nn.Module]) -> "RateProjectors":
        return cls({"_".join(map(str, rate)): module for rate, module in projectors.items()})
