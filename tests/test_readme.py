"""The README's numbers come from files; its snippets run."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *ROOT.glob("*/README.md"),
]
DOCUMENTS = [path for path in DOCUMENTS if path.is_file()]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_sections_are_what_the_kept_results_give():
    module = load(ROOT / "docs" / "demo_section.py")
    shown = README.split(module.BEGIN)[1].split(module.END)[0].strip()
    assert shown == module.short().strip(), "run python docs/demo_section.py"
    assert (module.KEPT / "README.md").read_text() == module.whole(), "run python docs/demo_section.py"


def test_the_projector_snippet_runs():
    snippet = re.search(r"## The projector in ten lines\n\n```python\n(.*?)```", README, re.S).group(1)
    names: dict = {}
    exec(snippet, names)
    assert names["out"].hidden_states.shape == (2, 150, 2048)
    assert names["projector"].w1.grad is not None


def operands() -> dict:
    """What docs/operators.md's snippet takes as given."""
    import torch

    T, D, H, O, E = 6, 8, 16, 12, 4
    one = {"gate_weight": (1, E, D), "w1": (E, H, D), "b1": (E, H), "w2": (E, O, H), "b2": (E, O)}
    sizes = one | {"ln_weight": (E, O), "ln_bias": (E, O), "tokens": (T, D), "x": (T, D), "bias": (2, O)}
    names = {name: torch.randn(size) for name, size in (sizes | {"a": (T, D), "b": (2, D, O)}).items()}
    return names | {"modality": torch.arange(T, dtype=torch.int32) % 2, "offs": torch.tensor([2, 6], dtype=torch.int32)}


def mixtral() -> dict:
    """What docs/integrations.md's snippets take as given: a model with experts that all of them know, the kernels."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from llama_smop.integrations import kernels_hub

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model": MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes)),
        "folder": kernels_hub.write("kernels"),
    }


def trained() -> dict:
    """What the snippets of docs/training.md and docs/video.md find in the working directory."""
    import numpy as np

    from llama_smop.data.media import write_video
    from llama_smop.models.model_folder import save
    from llama_smop.models.tiny import build_tiny

    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}
    save(*build_tiny(["bin", "now"], **sizes), "runs/demo/run/model")
    save(*build_tiny(["bin", "now"], rates=[[4, 2], [16, 5]], **sizes), "runs/both/model")
    for name in ("clip.mp4", "talk.mp4"):
        write_video(name, np.full((30, 96, 96, 3), 128, np.uint8), audio=np.zeros(30 * 640, np.float32))
    return {}


def saved() -> dict:
    """What the snippet of docs/checkpoints.md finds in the working directory."""
    trained()
    Path("runs/demo/run/model").rename("model")
    return {}


GIVEN = {
    "checkpoints.md": saved,
    "operators.md": operands,
    "integrations.md": lambda: trained() | mixtral(),
    "training.md": trained,
    "video.md": trained,
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_snippets_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        names = GIVEN.get(path.name, dict)()
        exec(snippet, names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"dead links in {path.name}: {missing}"


def test_what_contributing_names_is_there():
    """In its table of where to change what: every file, and every name in one of the files of its row."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where to change what")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("|") and "`" in line]
    for row in rows:
        words = re.findall(r"`([^`]+)`", row)
        places = [word for word in words if "/" in word]
        gone = [place for place in places if not (ROOT / place).exists()]
        assert places and not gone, f"{row}: no {gone or 'file'}"
        text = "".join((ROOT / place).read_text() for place in places if (ROOT / place).is_file())
        for name in (word for word in words if re.fullmatch(r"[\w.]+", word)):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), f"{row}: no {name}"
    assert len(rows) > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_options_in_the_documents_exist(path):
    """Every `llama-smop COMMAND --option` of a document is one that the command line has."""
    from typer.main import get_command

    from llama_smop.cli import app

    text = re.sub(r"\\\n\s*", " ", path.read_text())
    for line in re.findall(r"(?:llama-smop|llama_smop\.cli) ([a-z][^\n`|]*)", text):
        words = line.split("#")[0].split()
        command = get_command(app)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands") or not words, f"{path.name}: no command in {line!r}"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word)} - known - {"--help"}
        assert not unknown, f"{path.name}: {', '.join(unknown)} in {line!r}"
