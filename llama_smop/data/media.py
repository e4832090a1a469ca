"""Reading and writing clips: video by PyAV, audio by soundfile.

Whatever comes in, a clip leaves here as uint8 RGB frames at 25 a second and float32 mono at 16 kHz. Files are written
aside and renamed, so an interrupted write leaves nothing that looks like a clip.
"""

import io
import os
from fractions import Fraction
from math import gcd
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from scipy.signal import resample_poly

from llama_smop import files

AUDIO_RATE = 16000
VIDEO_RATE = 25
VIDEO_SIZE = 96
SAMPLES_PER_FRAME = AUDIO_RATE // VIDEO_RATE  # 640


_QUALIFIED_NAME = f"{__name__}.MediaError: "


class MediaError(ValueError):
    """A media file cannot be used: which one, and why."""

    def __init__(self, path: str | os.PathLike, reason: str | None = None):
        if reason is None:  # a torch data worker hands over its whole traceback as one text: keep the last line
            path, _, reason = str(path).strip().splitlines()[-1].removeprefix(_QUALIFIED_NAME).partition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):  # so that it crosses from a data worker with both arguments
        return type(self), (self.path, self.reason)


def _check_file(path: str | os.PathLike) -> None:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})") from None
    if os.path.isdir(path):
        raise MediaError(path, "is a folder, not a media file")
    if size == 0:
        raise MediaError(path, "the file is empty")


def _content(path: str | os.PathLike) -> bytes:
    _check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})") from None


def _open(path: str | os.PathLike, content: bytes | None):
    if content is None:
        _check_file(path)
    elif not content:
        raise MediaError(path, "the file is empty")
    try:
        return av.open(os.fspath(path) if content is None else io.BytesIO(content), metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(path, f"cannot be opened, it is truncated or not a media file ({reason})") from None


def read_video(
    path: str | os.PathLike, fps: int = VIDEO_RATE, size: int = VIDEO_SIZE, content: bytes | None = None
) -> np.ndarray:
    """Frames of a video, uint8 RGB (T, size, size, 3).

    Another frame rate is resampled to `fps` (the nearest frame in time), another size is scaled so that the shorter
    side fits and cropped around the centre. content: the file's bytes where they are in memory already; `path` then
    only names it. Raises MediaError where the file is missing, empty, truncated, or has no video.
    """
    frames, times = [], []
    with _open(path, content) as container:
        if not container.streams.video:
            raise MediaError(path, "has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # clips are short, and data workers already run side by side
        scaler = VideoReformatter()
        packets = 0
        try:
            for packet in container.demux(stream):
                if packet.size and packet.is_corrupt:
                    raise MediaError(path, f"is truncated: frame {packets} is incomplete")
                packets += bool(packet.size)
                for frame in packet.decode():
                    frames.append(_square_rgb(frame, size, scaler))
                    times.append(frame.time)
        except (av.FFmpegError, OSError) as error:
            raise MediaError(path, f"cannot be decoded after {len(frames)} frames ({error.strerror})") from None
        if packets < stream.frames:
            raise MediaError(path, f"is truncated: {packets} of {stream.frames} frames")
        rate = float(stream.average_rate or stream.guessed_rate or fps)
    if not frames:
        raise MediaError(path, "holds no frame")
    video = np.stack(frames)
    if abs(rate - fps) < 1e-3:
        return video
    return video[_nearest_frames(times, rate, fps)]


def _square_rgb(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    image = scaler.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _nearest_frames(times: list[float | None], rate: float, fps: int) -> np.ndarray:
    if any(t is None for t in times):
        times = [i / rate for i in range(len(times))]
    seen = np.asarray(times, dtype=np.float64) - times[0]
    count = max(1, round((seen[-1] + 1 / rate) * fps))
    wanted = np.arange(count) / fps
    after = np.clip(np.searchsorted(seen, wanted), 1, max(len(seen) - 1, 1))
    if len(seen) == 1:
        return np.zeros(count, dtype=np.int64)
    return np.where(wanted - seen[after - 1] <= seen[after] - wanted, after - 1, after)


def read_audio(path: str | os.PathLike, rate: int = AUDIO_RATE, content: bytes | None = None) -> np.ndarray:
    """Samples of an audio file, or of the audio stream of a video, float32 (samples,), mono at `rate` Hz.

    Channels are averaged, another rate is resampled. content: as in `read_video`. Raises MediaError where the file is
    missing, empty, truncated or silent of samples, or holds NaN or infinity.
    """
    if Path(path).suffix.lower() in (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff", ".au"):
        samples, source = _read_sound_file(path, _content(path) if content is None else content)
    else:
        samples, source = _read_audio_stream(path, content)
    if not len(samples):
        raise MediaError(path, "holds no sound")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise MediaError(path, "holds samples that are not finite numbers")
    if source != rate:
        common = gcd(source, rate)
        samples = resample_poly(samples, rate // common, source // common)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _read_sound_file(path: str | os.PathLike, content: bytes) -> tuple[np.ndarray, int]:
    declared = int.from_bytes(content[4:8], "little")
    if content[:4] == b"RIFF" and 0 < declared < 0xFFFFFF00 and declared + 8 > len(content) + 1:
        # libsndfile would silently return what is there; a declared size of 0 or all ones comes from a pipe
        raise MediaError(path, f"is truncated: {len(content)} of {declared + 8} bytes")
    if not content:
        raise MediaError(path, "the file is empty")
    try:
        return soundfile.read(io.BytesIO(content), dtype="float32")
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(path, f"cannot be read as sound ({str(error).rstrip('.').split(': ')[-1]})") from None


def _read_audio_stream(path: str | os.PathLike, content: bytes | None) -> tuple[np.ndarray, int]:
    chunks = []
    with _open(path, content) as container:
        if not container.streams.audio:
            raise MediaError(path, "has no audio stream, and no .wav lies beside it")
        stream = container.streams.audio[0]
        rate = stream.rate
        resampler = av.AudioResampler(format="fltp")
        try:
            for frame in container.decode(stream):
                chunks += [out.to_ndarray() for out in resampler.resample(frame)]
            chunks += [out.to_ndarray() for out in resampler.resample(None)]
        except (av.FFmpegError, OSError) as error:
            raise MediaError(path, f"its audio cannot be decoded ({error.strerror})") from None
    if not chunks:
        return np.zeros(0, dtype=np.float32), rate
    return np.concatenate(chunks, axis=1).T, rate


def audio_path(video_path: str | os.PathLike) -> Path:
    """Where the sound of a clip lies: the .wav beside it, or the video itself where there is none."""
    wav = Path(video_path).with_suffix(".wav")
    return wav if wav.exists() else Path(video_path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file aside and renames it; where that fails (MediaError), an earlier file of that name is untouched."""
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise MediaError(path, f"cannot be written ({error.strerror or error})") from None


def write_audio(path: str | os.PathLike, samples: np.ndarray, rate: int = AUDIO_RATE) -> None:
    """Writes float samples in [−1, 1], (samples,), as 16-bit PCM."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    write_bytes(path, buffer.getvalue())


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: int = VIDEO_RATE,
    audio: np.ndarray | None = None,
    rate: int = AUDIO_RATE,
) -> None:
    """Writes uint8 RGB frames (T, H, W, 3) as H.264 in mp4, with the sound as AAC where `audio` (samples,) is given.

    The same input gives the same bytes.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected uint8 frames (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"expected an even height and width for H.264, got {frames.shape[1]}×{frames.shape[2]}")
    # In memory first: the codecs' libraries would not say that a disk is full.
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        picture = container.add_stream("libx264", rate=fps)
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        picture.thread_count = 1
        # Without x264's lookahead, whose macroblock tree gives other bytes from time to time.
        picture.options = {"preset": "superfast", "crf": "20", "x264-params": "mbtree=0:rc-lookahead=0"}
        if audio is not None:
            sound = container.add_stream("aac", rate=rate, layout="mono", format="fltp")
            sound.bit_rate = 48000
            sound.options = {"aac_coder": "fast"}
            sound.codec_context.flags |= av.codec.context.Flags.bitexact
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio, dtype=np.float32)[None], "fltp", "mono")
            frame.rate = rate
            frame.pts = 0
            frame.time_base = Fraction(1, rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        scaler = VideoReformatter()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(picture.encode(scaler.reformat(frame, format="yuv420p", threads=1)))
        container.mux(picture.encode(None))
    write_bytes(path, buffer.getvalue())
