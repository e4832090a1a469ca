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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"dead links in {path.name}: {missing}"


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
