"""A generated clip as a camera would have filmed its speaker: a head in a room, of which the clip shows the mouth."""

import os
from pathlib import Path

from llama_smop.data.media import audio_path, read_audio, read_video
from llama_smop.data.synthetic.corpus import UNSEEN_VOICES, VOICES
from llama_smop.data.synthetic.head import draw_head, filmed
from llama_smop.data.video_writer import write_frames

SIZE = (480, 640)


def film_clip(
    clip: str | os.PathLike, out: str | os.PathLike, *, scale: float = 1.4, drift: float = 0.03, seed: int = 0
) -> None:
    """Write an mp4 of 640×480 pixels with the sound of `clip`, whose folder is named after its voice.

    Args:
        scale, drift: of the head, see `head.filmed`. seed: of the room.

    Raises:
        ValueError: no such voice. MediaError: a clip that cannot be read, a file that cannot be written.
    """
    name = Path(clip).parent.name
    face = next((voice.face for voice in (*VOICES, *UNSEEN_VOICES) if voice.name == name), None)
    if face is None:
        raise ValueError(f"{clip}: no voice of the generated corpus is called {name!r}")
    heads = draw_head(read_video(clip), face)
    frames = filmed(heads, SIZE, scale=scale, drift=drift, room=seed)
    write_frames(out, frames, sound=[read_audio(audio_path(clip))], fine=True)
