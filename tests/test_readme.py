"""The README's numbers come from files; its snippets run."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_section_is_what_the_kept_results_give():
    module = load(ROOT / "docs" / "demo_section.py")
    shown = README.split(module.BEGIN)[1].split(module.END)[0].strip()
    assert shown == module.section().strip(), "run python docs/demo_section.py"


def test_the_projector_snippet_runs():
    snippet = re.search(r"## The projector in ten lines\n\n```python\n(.*?)```", README, re.S).group(1)
    names: dict = {}
    exec(snippet, names)
    assert names["out"].hidden_states.shape == (2, 150, 2048)
    assert names["projector"].w1.grad is not None


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"dead links in README.md: {missing}"
