"""The kernels in the layout that Hugging Face's `kernels` package loads: importing them then needs no install.

    OUT/build.toml, OUT/CARD.md
    OUT/build/torch-universal/metadata.json
    OUT/build/torch-universal/llama_smop/          a copy of projector, operators, Triton kernels and integrations

A copy may be imported under any name, next to other copies: its imports are relative, and its operators are registered
in a namespace of its own, named after a hash of its files. It needs torch, and Triton on a GPU.
"""

import ast
import hashlib
import json
from pathlib import Path

import llama_smop
from llama_smop.system import files

NAME, VERSION = "llama-smop", 1  # VERSION is the interface's, as the hub counts: whole numbers
PACKAGE = NAME.replace("-", "_")
VARIANT = Path("build") / "torch-universal"
FOLDERS = ("ops", "integrations", "triton_kernels")
MODULES = ("functional", "projector", "projector_forms", "system/__init__", "system/files", "system/provenance")

INIT = '''"""The sparse mixture of projectors of llama-smop {version}, written by `llama-smop kernels`; see CARD.md."""

from . import functional, integrations
from .functional import SMoPOutput
from .integrations import layers, register, replace_experts
from .projector import DenseProjector, SMoPProjector

__version__ = "{version}"
__all__ = [
    "DenseProjector",
    "SMoPOutput",
    "SMoPProjector",
    "functional",
    "integrations",
    "layers",
    "register",
    "replace_experts",
]
'''

BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- mixture-of-experts
---

# Sparse mixture of projectors

The router, the grouped GEMMs and the combine of [Llama-SMoP](https://arxiv.org/abs/2505.14336) in Triton, forward and
backward, from llama-smop {version}. On a CPU, and on a GPU without Triton, PyTorch serves.

```python
from kernels import get_local_kernel

smop = get_local_kernel("this/folder")
projector = smop.SMoPProjector(1024, 2048, 2048, num_experts=4, top_k=2)
y, *_ = projector(x, modality)
```

| name | what it is |
|---|---|
| `SMoPProjector`, `DenseProjector` | the layers |
| `functional.smop`, `.route`, `.expert_projection`, `.grouped_mm` | the operators |
| `replace_experts(model)` | swaps mixtures of projectors in a model for these operators |
| `register()` | `model.set_experts_implementation("smop")` for Hugging Face mixtures |
| `layers.SMoPProjector`, `layers.Experts` | for `kernelize` |
"""


def write(out: str | Path) -> Path:
    """Write the layout to the folder `out`, which is new, empty, or was written by this function.

    Raises:
        OSError: `out` holds something else, or cannot be written.
    """
    return files.write_folder(out, _fill, _owned)


def _owned(folder: Path) -> set[str] | None:
    """The files that an earlier `write` left; None if it did not write this folder."""
    try:
        name = files.read_json(folder / VARIANT / "metadata.json")["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if name != NAME:
        return None
    found = {str(path.relative_to(folder)) for path in (folder / VARIANT).rglob("*") if path.is_file()}
    return found | {"build.toml", "CARD.md"}


def _fill(folder: Path) -> None:
    sources = _sources()
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    package = folder / VARIANT / PACKAGE
    for name, text in sources.items():
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("smop::", f"smop_{digest}::"), encoding="utf-8")
    (package / "__init__.py").write_text(INIT.format(version=llama_smop.__version__), encoding="utf-8")
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    (folder / "CARD.md").write_text(CARD.format(version=llama_smop.__version__), encoding="utf-8")
    metadata = {
        "id": f"_{PACKAGE}_{digest}",  # the name under which it is imported
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    files.write_json(folder / VARIANT / "metadata.json", metadata)


def _sources() -> dict[str, str]:
    """{path below the package: text}, imports made relative."""
    root = Path(llama_smop.__file__).parent
    found = {f"{name}.py": (root / f"{name}.py") for name in MODULES}
    for name in FOLDERS:
        # In a checkout the Triton kernels lie beside the package.
        folder = root / name if (root / name).is_dir() else root.parent / name
        found |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    del found[f"integrations/{Path(__file__).name}"]
    return {name: relative_imports(found[name].read_text(encoding="utf-8"), name) for name in sorted(found)}


def relative_imports(text: str, name: str) -> str:
    """`from llama_smop.ops import checks` → `from .ops import checks`, in the file `name` below the package."""
    lines = text.splitlines(keepends=True)
    dots = "." * name.count("/") + "."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
            old, new = node.module, dots + node.module.removeprefix(PACKAGE).removeprefix(".")
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {old} import", f"from {new} import")
        elif isinstance(node, ast.Import) and any(a.name.partition(".")[0] == PACKAGE for a in node.names):
            raise ValueError(f"{name}: `import {PACKAGE}` cannot be made relative; use `from {PACKAGE} import …`")
    return "".join(lines)
