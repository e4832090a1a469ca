"""Composes a configuration from several YAML files. Later files override earlier ones; every key remembers its source.

A file may include others with `include: [NAME, …]`. A NAME is a path, relative to the including file or to the working
directory, or the name of a shipped file without its suffix (`llama-smop configs` lists them).
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llama_smop.system.read_yaml import parse_yaml, read_yaml

Model = TypeVar("Model", bound=BaseModel)
INCLUDE = "include"
MAX_FILES = 200
MAX_DEPTH = 20


class Composition:
    """The merged content. Mappings are merged key by key; other values, also lists, are replaced."""

    def __init__(self):
        self.content: dict = {}
        self.sources: list[str] = []
        self._files = 0
        self._origin: dict[tuple[str, ...], list[str]] = {}

    def add(self, content: Mapping, source: str) -> None:
        self.sources.append(source)
        _merge(self.content, content, source, self._origin, ())

    def add_file(self, name: str | Path, beside: Path | None = None, within: tuple[Path, ...] = ()) -> None:
        """Raises ValueError: no such file, not YAML, not a mapping, or a circular include."""
        path = find(name, beside)
        real = path.resolve()
        within_real = [file.resolve() for file in within]
        if real in within_real:
            raise ValueError(
                f"{path}: includes itself by way of {' and '.join(map(str, within[within_real.index(real) :]))}"
            )
        self._files += 1
        if self._files > MAX_FILES:
            raise ValueError(f"{path}: more than {MAX_FILES} files are included, repetitions counted")
        content = read_mapping(path)
        included = content.pop(INCLUDE, [])
        if not isinstance(included, list) or not all(isinstance(entry, str) for entry in included):
            raise ValueError(f"{path}: {INCLUDE}: expected a list of names")
        for entry in included:
            self.add_file(entry, path.parent, (*within, path))
        self.add(content, str(path))

    def check(self, model: type[Model]) -> Model:
        """The content, validated as a pydantic model.

        Raises:
            ValueError: an unknown key or a value out of range; one line that names the source file and the key.
        """
        try:
            return model.model_validate(self.content)
        except ValidationError as error:
            found = [(self._source_of(e["loc"]), _one_line(e)) for e in error.errors()]
        by_source: dict[str, list[str]] = {}
        for source, message in found:
            by_source.setdefault(source, []).append(message)
        raise ValueError("; ".join(f"{source}: {'; '.join(messages)}" for source, messages in by_source.items()))

    def _source_of(self, where: tuple) -> str:
        path = tuple(map(str, where))
        for end in range(len(path), 0, -1):
            if path[:end] in self._origin:
                return " + ".join(self._origin[path[:end]])
        return " + ".join(self.sources)


def compose(
    sources: str | Path | Sequence[str | Path],
    overrides: Mapping | None = None,
    settings: Iterable[str] = (),
    beside: Path | None = None,
) -> Composition:
    """Compose `sources` in order, then `overrides` (nested keys), then `settings` ("key.path=value", value in YAML)."""
    composition = Composition()
    for source in [sources] if isinstance(sources, str | Path) else sources:
        composition.add_file(source, beside)
    if overrides:
        composition.add(overrides, "overrides")
    for setting in settings:
        composition.add(parse_setting(setting), f"--set {setting}")
    return composition


def parse_setting(setting: str) -> dict:
    """ "a.b=1" -> {"a": {"b": 1}}. Raises ValueError: no key, no "=", or the value is not YAML."""
    key, equals, text = setting.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {setting}: expected key.path=value")
    if len(keys) > MAX_DEPTH:
        raise ValueError(f"--set {setting[:100]}…: the key has more than {MAX_DEPTH} parts")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {setting}: {error}") from None
    for name in reversed(keys):
        value = {name: value}
    return value


def shipped() -> dict[str, Path]:
    """The YAML files that ship with the package, by name."""
    root = Path(str(resources("llama_smop") / "configs"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def summary(path: Path) -> str:
    """The first comment line of a YAML file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find(name: str | Path, beside: Path | None = None) -> Path:
    for path in ([beside / name] if beside else []) + [Path(name)]:
        try:
            if path.is_file():
                return path
        except (OSError, ValueError) as error:  # a name too long, or with a NUL
            raise ValueError(f"{str(name)[:100]!r}: not a valid file name ({error})") from None
    known = shipped()
    if str(name) not in known:
        raise ValueError(f"{name}: no such file, and no shipped file of that name (`llama-smop configs` lists them)")
    return known[str(name)]


def read_mapping(path: Path) -> dict:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values")
    return content


def _merge(base: dict, new: Mapping, source: str, origin: dict, where: tuple[str, ...]) -> None:
    for key, value in new.items():
        path = (*where, str(key))
        if isinstance(value, Mapping):
            if not isinstance(base.get(key), dict):
                base[key], origin[path] = {}, []
            if source not in origin[path]:
                origin[path].append(source)
            _merge(base[key], value, source, origin, path)
        else:
            base[key], origin[path] = value, [source]
            for deeper in [p for p in origin if len(p) > len(path) and p[: len(path)] == path]:
                del origin[deeper]


def _one_line(error: Mapping) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
