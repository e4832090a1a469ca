"""Reads untrusted YAML: its size is limited, and every error names the file."""

import os
from pathlib import Path

import yaml

MAX_BYTES = 2**20
MAX_NODES = 10_000  # values, with the repetitions by aliases


def read_yaml(path: str | os.PathLike):
    """Raises ValueError: no such file, not YAML, not UTF-8, or too large; one line, naming the file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB, the limit of a configuration file")
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_yaml(text: str):
    """Raises ValueError: not YAML, a value that contains itself, or more than `MAX_NODES` values; one line."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values, repetitions by aliases included")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("not YAML: nested too deeply") from None
    except (OverflowError, TypeError, AttributeError, KeyError) as error:  # a value that does not fit its tag
        raise ValueError(f"not YAML: {type(error).__name__}: {error}") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The number of values in a node. Raises ValueError: the node contains itself."""
    if id(node) not in known:
        known[id(node)] = None
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    size = known[id(node)]
    if size is None:
        raise ValueError(f"a value contains itself (line {node.start_mark.line + 1})")
    return size
