"""Fetch configs, tokenizers and weights by name or folder, with errors that say what to do."""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import cached_file
from yaml import YAMLError

from llama_smop.models.seal import CARD, is_edited

HUB_SECONDS = 5
# Arguments of `from_pretrained` that say where files are.
WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class Source:
    """A model folder or hub name as `from_pretrained` got it, with the arguments that say which of its files."""

    def __init__(self, name: str | Path, arguments: dict | None = None):
        self.name = str(name)
        self.where = {k: v for k, v in (arguments or {}).items() if k in WHERE and v is not None}

    def __str__(self) -> str:
        return str(Path(self.name, self.where["subfolder"])) if self.where.get("subfolder") else self.name

    def file(self, name: str) -> Path | None:
        """Path of one of its files, downloaded if necessary; None if it has no such file."""
        found = cached_file(
            self.name,
            name,
            **self.where,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def upload(
    folder: Path,
    names: Iterable[str],
    *,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    **repository,
) -> CommitInfo:
    """Put files of `folder`, by name, and its model card into a repository of the hub.

    A card that somebody edited there is replaced by one that somebody edited here, and by no other; the form that
    transformers leaves there when a processor is pushed is nobody's.

    repository: further arguments of `create_repo`.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, exist_ok=True, **repository).repo_id
    if revision is not None and not revision.startswith("refs/"):
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    own = (folder / CARD).exists()
    if own and not is_edited(folder / CARD) and hub.file_exists(repo_id, CARD, revision=revision):
        there = Path(hub.hf_hub_download(repo_id, CARD, revision=revision))
        own = not is_edited(there) or is_blank_form(there)
    return hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*names, *([CARD] if own else [])],
        commit_message=commit_message or "Upload LlamaSmopForConditionalGeneration",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def is_blank_form(card: Path) -> bool:
    """Whether a model card is transformers' form, with nothing filled in but its sentence on how it came about."""
    try:
        text = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).text
    except (OSError, ValueError, TypeError, YAMLError):
        return False
    before, _, after = ModelCard.from_template(ModelCardData(), model_description="\0").text.partition("\0")
    told = text.removeprefix(before).removesuffix(after)
    return len(before + told + after) == len(text) and re.fullmatch("This is the model card of a .*", told) is not None


def is_hub_name(source: str) -> bool:
    """Whether a source of weights is a name on the hub, not a folder or a file."""
    if Path(source).exists() or source.startswith((".", "~")) or source.endswith((".pt", ".pth", ".ckpt", ".gguf")):
        return False
    try:
        validate_repo_id(source)
    except ValueError:
        return False
    return True


def fetch(kind: Any, name: str | Path, **kwargs) -> Any:
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
        if not _hub_reachable():
            raise ValueError(
                f"{name}: no such folder, not in the cache, and the hub does not answer; download it where there is a "
                f"network (hf download {name}) and give the folder's path"
            ) from error
    try:
        return kind.from_pretrained(str(name), **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no such folder, and the hub does not have it ({_first_line(error)})") from error


def _hub_reachable() -> bool:
    """Whether the hub answers one short request: transformers requests many files and waits long for each."""
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
