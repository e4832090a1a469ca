"""Where the files of visitors lie while they are needed: a temporary folder, gone when the server ends."""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SWEEP_S = 30
SHORT_S = 300.0  # that files are kept at least, also where room is short


class Shelf:
    """Folders under names that cannot be guessed. What has lain for `keep_s` seconds is removed.

    most: bytes of all files, those on their way too; None = any. root: readable by this user alone. uploads: a folder
    in it for what browsers send.
    """

    def __init__(self, keep_s: float = 1800.0, most: int | None = None):
        self.root = Path(tempfile.mkdtemp(prefix="llama-smop-serve-"))
        self.uploads = self.root / "uploads"
        self.uploads.mkdir()
        self._results = self.root / "results"
        self._results.mkdir()
        self._keep_s, self._most = keep_s, most
        self._coming = 0  # bytes
        self._of: dict[str, set[Path]] = {}  # what each visitor has here
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="llama-smop-shelf").start()

    def new(self) -> Path:
        """A new empty folder."""
        folder = self._results / secrets.token_urlsafe(18)
        folder.mkdir()
        return folder

    def find(self, key: str, name: str) -> Path | None:
        """The file `name` of the folder `key`; None where there is none of these names."""
        for folder in self._results.iterdir():  # compared, never joined: a name from outside is no path
            if secrets.compare_digest(folder.name.encode(), key.encode("utf-8", "replace")):
                return next((file for file in folder.iterdir() if file.name == name), None)
        return None

    def drop(self, folder: Path) -> None:
        """Remove a folder that `new` made."""
        if folder.parent == self._results:
            shutil.rmtree(folder, ignore_errors=True)

    def give(self, visitor: str, upload: Path, folder: Path) -> None:
        """Note what a visitor has here: the file that was sent, and a result in place of the one before."""
        before = self._of.get(visitor, set())
        self._of[visitor] = {folder} | {path for path in before if path.parent != self._results}
        if upload.is_relative_to(self.uploads):
            self._of[visitor].add(self.uploads / upload.relative_to(self.uploads).parts[0])
        for path in before - self._of[visitor]:
            self.drop(path)

    def leave(self, visitor: str) -> None:
        """Remove what a visitor who has left had here, but for files that others sent too."""
        others = {path for name, paths in self._of.items() if name != visitor for path in paths}
        for path in self._of.pop(visitor, set()) - others:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def room_for(self, size: int) -> Iterator[bool]:
        """Whether there is room for `size` bytes more, which is theirs while this is open. What has lain for SHORT_S
        seconds makes place."""
        enough = self._most is None or self._held() + self._coming + size <= self._most
        if not enough:
            self.sweep(keep_s=min(SHORT_S, self._keep_s))
            enough = self._held() + self._coming + size <= self._most
        self._coming += size if enough else 0
        try:
            yield enough
        finally:
            self._coming -= size if enough else 0

    def _held(self) -> int:
        """Bytes of all files; one with two names counts once."""
        sizes = {}
        for file in self.root.rglob("*"):
            with suppress(OSError):  # somebody else removed it
                state = file.stat()
                sizes[state.st_ino] = 0 if file.is_dir() else state.st_size
        return sum(sizes.values())

    def sweep(self, keep_s: float | None = None) -> None:
        """Remove what has been here too long: `keep_s` seconds, by default as long as the shelf keeps things."""
        oldest = time.time() - (self._keep_s if keep_s is None else keep_s)
        for entry in (*self._results.iterdir(), *self.uploads.iterdir()):
            try:
                if max(file.stat().st_mtime for file in (entry, *entry.rglob("*"))) < oldest:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            except OSError:  # somebody else removed it
                continue

    def close(self) -> None:
        """Remove everything."""
        self._ended.set()
        shutil.rmtree(self.root, ignore_errors=True)

    def _watch(self) -> None:
        while not self._ended.wait(SWEEP_S):
            self.sweep()
