"""Getting configs, tokenizers and weights by name or folder, with errors that say what to do."""

import os
import urllib.error
import urllib.request
from pathlib import Path

HUB_SECONDS = 5


def fetch(kind, name: str | Path, **kwargs):
    """`kind.from_pretrained(name)`, for any transformers class; `name` may be a folder, a .gguf file, or a hub name,
    which is looked up in the cache first.

    Raises:
        ValueError: a folder without the file asked for, or a hub name with neither network nor cache.
    """
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        kwargs["gguf_file"], name = Path(name).name, Path(name).parent
    if Path(name).is_dir():
        try:
            return kind.from_pretrained(str(name), **kwargs)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{name}: {kind.__name__} cannot be read from this folder ({_first_line(error)})"
            ) from error
    try:
        return kind.from_pretrained(str(name), local_files_only=True, **kwargs)
    except (OSError, ValueError) as error:
        if not _hub_answers():
            raise ValueError(
                f"{name}: no such folder, not in the cache, and the hub does not answer; download it where there is a "
                f"network (hf download {name}) and give the folder's path"
            ) from error
    try:
        return kind.from_pretrained(str(name), **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: neither a folder here nor to be had from the hub ({_first_line(error)})") from error


def _hub_answers() -> bool:
    """One quick question first: transformers asks for many files, and waits long for each."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
        return False
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
