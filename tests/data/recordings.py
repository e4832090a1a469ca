"""Containers of every kind for the tests, made with PyAV: pictures and sound at the times they are given."""

import io
from fractions import Fraction

import av
import numpy as np

TICKS = 1000  # a second, of the timestamps


class NoWayBack(io.BytesIO):
    """A file that is written from its beginning to its end, as a browser's recorder does: no length, no index."""

    def seekable(self):
        return False

    seek = None


def numbered(count: int, height: int = 96, width: int = 96) -> np.ndarray:
    """Frame k, of at most 55, is a flat grey of 20 + 4·k, which survives a codec and says which frame it is."""
    greys = (20 + 4 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def numbers(video) -> list[int]:
    return [round((float(np.mean(frame)) - 20) / 4) for frame in video]


def tone(hertz: float, seconds: float, rate: int = 16000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def record(
    path,
    frames=None,
    times=None,
    sound=None,
    *,
    rate: int = 16000,
    fps: int = 25,
    later: float = 0.0,
    gap: tuple[float, float] | None = None,
    video: str = "libx264",
    audio: str = "aac",
    pixels: str = "yuv420p",
    layout: str = "mono",
    rotation: int = 0,
    form: str | None = None,
    live: bool = False,
):
    """Writes a container and returns `path`.

    frames: uint8 (T, H, W, 3), shown at `times` in seconds, by default `fps` a second; sound: (n,) or (channels, n),
    beginning `later` seconds after the clock's zero and without what lies in `gap`. live: as a browser records.
    """
    target = NoWayBack() if live else str(path)
    with av.open(target, "w", format=form or ("webm" if live else None)) as out:
        picture = voice = None
        if frames is not None:
            picture = out.add_stream(video, rate=fps)
            picture.height, picture.width = frames.shape[1:3]
            picture.pix_fmt = pixels
            picture.codec_context.time_base = Fraction(1, TICKS)
            picture.options = {"deadline": "realtime", "cpu-used": "8"} if "vp" in video else {}
            if video == "libx264":
                picture.options = {"preset": "ultrafast", "crf": "12"}
            if rotation:
                picture.set_display_rotation(rotation)
        if sound is not None:
            sound = np.atleast_2d(sound)
            voice = out.add_stream(audio, rate=rate, layout=layout)
        if picture is not None:
            times = np.arange(len(frames)) / fps if times is None else times
            for image, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
                frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        if voice is not None:
            for packet in _sound_packets(voice, sound, rate, layout):
                if packet.pts is None:
                    continue
                at = float(packet.pts * packet.time_base)
                if gap is not None and gap[0] <= at < gap[1]:
                    continue
                shift = round(later / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                out.mux(packet)
    if live:
        path.write_bytes(target.getvalue())
    return path


def _sound_packets(voice, sound, rate, layout):
    resampler = av.AudioResampler(format=voice.codec_context.format, layout=layout, rate=voice.codec_context.rate)
    for begin in range(0, sound.shape[1], 1024):
        samples = np.ascontiguousarray(sound[:, begin : begin + 1024].T.reshape(1, -1), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, "flt", layout)
        frame.rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        for part in resampler.resample(frame):
            yield from voice.encode(part)
    for part in resampler.resample(None):
        yield from voice.encode(part)
    yield from voice.encode(None)
