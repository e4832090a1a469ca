"""Imports inside the package run downwards only, and in no circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llama_smop"
# From the ground up. What stands further down may import what stands above it in this list, never the reverse.
LAYERS = (
    "system",
    "triton_kernels",
    "ops",
    "functional",
    "projector_forms",
    "projector",
    "doctor",
    "integrations",
    "models",
    "data",
    "convert",
    "evaluation",
    "transcription",
    "reports",
    "serve",
    "training",
    "estimate",
    "ablation",
    "demo",
    "cli",
)
# Upwards, inside a function: the processor reads files and normalises clips where a user hands it such.
ON_DEMAND = {("llama_smop.models.clips", f"llama_smop.data.{module}") for module in ("media", "timeline", "transforms")}


def modules() -> dict[str, Path]:
    """Dotted name → file, of every module of the package and of the kernels."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "triton_kernels", f"{PACKAGE}.triton_kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that `path` imports, inside functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*outer, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {module for module in found if module in known and module != name}


def graph() -> dict[str, set[str]]:
    known = modules()
    # The package's own __init__ offers names from everywhere, on demand.
    return {name: imports(name, path, known) - {PACKAGE} for name, path in known.items() if name != PACKAGE}


def layer(module: str) -> str:
    return module.split(".")[1]


def test_every_entry_of_the_package_has_its_layer():
    assert {layer(module) for module in graph()} == set(LAYERS), "name new entries in LAYERS, at their height"


def test_imports_run_downwards():
    upwards = [
        f"{module} imports {imported}"
        for module, targets in graph().items()
        for imported in targets
        if LAYERS.index(layer(imported)) > LAYERS.index(layer(module)) and (module, imported) not in ON_DEMAND
    ]
    assert not upwards, "\n".join(sorted(upwards))


def test_no_module_imports_itself_by_way_of_others():
    circle = find_circle(graph())
    assert circle is None, " -> ".join(circle or ())


@pytest.mark.parametrize("planted", [{"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"b"}}])
def test_a_circle_is_found(planted):
    assert find_circle(planted) is not None


def find_circle(edges: dict[str, set[str]]) -> list[str] | None:
    """The first circle that a depth-first walk meets."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(edges.get(node, ())):
            if (circle := walk(target, [*path, node])) is not None:
                return circle
        done.add(node)
        return None

    for start in sorted(edges):
        if (circle := walk(start, [])) is not None:
            return circle
    return None
