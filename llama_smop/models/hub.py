"""Getting configs, tokenizers and weights by name or folder, with errors that say what to do."""

from pathlib import Path


def fetch(kind, name: str | Path, **kwargs):
    """`kind.from_pretrained(name)`, for any transformers class; `name` may also be a .gguf file.

    Raises:
        ValueError: a folder without the file asked for, or a hub name with neither network nor cache.
    """
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        kwargs["gguf_file"], name = Path(name).name, Path(name).parent
    try:
        return kind.from_pretrained(str(name), **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(name).is_dir():
            raise ValueError(f"{name}: {kind.__name__} could not be read from this folder ({reason})") from error
        raise ValueError(
            f"{name}: neither a folder here nor reachable on the hub, and not in the cache; download it where there is "
            f"a network (huggingface-cli download {name}) and give the folder's path"
        ) from error
