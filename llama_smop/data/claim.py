"""A folder is filled with one kind of output, under one set of settings; `settings.json` in it notes which."""

from pathlib import Path

from llama_smop.system import files

NOTE = "settings.json"


def claim_folder(folder: Path, settings: dict, kind: str, error: type[ValueError]) -> None:
    """Note `settings` in a new or empty folder, or check that they are those of an interrupted run in it.

    kind: what the folder holds, for the messages. error: the exception to raise.

    Raises:
        ValueError (`error`): the folder holds something else, or the same kind with other settings.
    """
    note = folder / NOTE
    if note.exists():
        found = files.read_json(note)
        found = found if isinstance(found, dict) else {}
        differing = [name for name in settings if found.get(name) != settings[name]]
        if differing:
            raise error(
                f"{folder} holds {kind} made with other settings ({', '.join(differing)}): "
                "choose another folder or delete it"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise error(f"{folder} is not empty and holds no {kind}: choose another folder")
    else:
        files.write_json(note, settings)
