"""Prompts as chats: the template of a message with clips, and the files in such a message read."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llama_smop.models import clips
from llama_smop.models.units import AUDIO, AUDIO_END, VIDEO, VIDEO_END

TEMPLATE = """\
{%%- set prompts = %s %%}
{%%- set parts = [] if messages[0]['content'] is string else messages[0]['content'] %%}
{%%- set audio = parts | selectattr('type', 'equalto', 'audio') | list | length %%}
{%%- set video = parts | selectattr('type', 'equalto', 'video') | list | length %%}
{%%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %%}
{%%- if messages | length > 1 or messages[0]['role'] != 'user' or audio > 1 or video > 1 or not (audio or video) %%}
  {{- raise_exception('llama_smop takes one message, of a user, with one clip of audio, video or both') }}
{%%- endif %%}
{{- bos_token }}
{%%- if audio %%}{{- '<audio></audio>' }}{%%- endif %%}
{%%- if video %%}{{- '<video></video>' }}{%%- endif %%}
{{- text or prompts['audiovisual' if audio and video else 'audio' if audio else 'video'] }}"""
# What stands for a clip in a text, until the processor knows how many tokens it has.
AUDIO_CLIP, VIDEO_CLIP = AUDIO + AUDIO_END, VIDEO + VIDEO_END


def default_template(prompts: Mapping[str, str]) -> str:
    """The Jinja template of `BOS <audio></audio><video></video>PROMPT` for a user's one message.

    Its text parts replace the prompt of the modality. The parts' order does not matter, the sequence's is fixed.
    """
    return TEMPLATE % json.dumps(dict(prompts))


def with_clips_read(conversation: list, with_sound: bool) -> list:
    """A copy of a conversation, or of several, in which files are read: arrays in place of paths and addresses.

    with_sound: the sound of every video file becomes an audio part too.
    """
    if conversation and isinstance(conversation[0], list | tuple):
        return [with_clips_read(one, with_sound) for one in conversation]
    read = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [_read(part, content, with_sound) for part in content]
            sounds = [
                {"type": "audio", "audio": clips.read_audio(path)}
                for part in content
                if with_sound and part.get("type") == "video" and isinstance(path := _clip(part), str | os.PathLike)
            ]
            content = [*parts, *sounds]
        read.append({**message, "content": content})
    return read


def _clip(part: Mapping[str, Any]) -> Any:
    """The clip that a part of a message holds, under any of the names in use; None where it holds none."""
    names = (part.get("type"), "path", "url")
    return next((part[name] for name in names if part.get(name) is not None), None)


def _read(part: Mapping[str, Any], content: list, with_sound: bool) -> dict:
    kind, clip = part.get("type"), _clip(part)
    if kind not in ("audio", "video") or clip is None:
        return copy.copy(dict(part))
    if isinstance(clip, str | os.PathLike):
        heard = with_sound or any(other.get("type") == "audio" for other in content)
        clip = clips.read_audio(clip) if kind == "audio" else clips.read_video(clip, with_sound=heard)
    return {"type": kind, kind: clip.detach().cpu().numpy() if isinstance(clip, Tensor) else clip}
