"""A saved folder opens by transformers' Auto classes, whatever is imported first, and never as something else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_smop.models import auto_classes
from tests.models.conftest import chosen, clip

ROOT = Path(__file__).resolve().parents[2]
MODEL = "LlamaSmopForConditionalGeneration"
OPENED = {
    "AutoConfig": "LlamaSmopConfig",
    "AutoModel": MODEL,
    "AutoModelForSpeechSeq2Seq": MODEL,
    "AutoModelForMultimodalLM": MODEL,
    "AutoProcessor": "LlamaSmopProcessor",
    "AutoFeatureExtractor": "WhisperFeatureExtractor",
}
OPEN = """
import transformers
from transformers.utils import logging
logging.disable_progress_bar()
for name in {names}:
    try:
        print(f"{{name}}=" + type(getattr(transformers, name).from_pretrained({folder!r})).__name__)
    except Exception as error:
        print(f"{{name}}=refused:", " ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in pair:
        part.save_pretrained(folder)
    return folder


def opened(before: str, folder: Path, names=tuple(OPENED)) -> dict[str, str]:
    """What each Auto class makes of the folder, in a fresh process."""
    script = before + OPEN.format(names=names, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, input="")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(Auto\w+)=(.*)", done.stdout))  # transformers asks something on the same line


@pytest.mark.parametrize(
    "before",
    [
        "from transformers import AutoModel, AutoProcessor\nimport llama_smop",
        pytest.param("import llama_smop, sys\nassert 'transformers' not in sys.modules", marks=pytest.mark.slow),
        pytest.param("from llama_smop import LlamaSmopConfig", marks=pytest.mark.slow),
        pytest.param("import llama_smop, peft", marks=pytest.mark.slow),
        pytest.param("import llama_smop, transformers.generation.utils", marks=pytest.mark.slow),
        pytest.param("import llama_smop.models.processing_llama_smop", marks=pytest.mark.slow),
    ],
)
def test_the_order_of_imports_does_not_matter(folder, before):
    assert opened(before, folder) == OPENED


def test_without_the_package_a_folder_is_refused_and_not_taken_for_another(folder):
    found = opened("import sys\nsys.modules['llama_smop'] = None", folder, ("AutoConfig", "AutoProcessor"))
    assert "does not recognize this architecture" in found["AutoConfig"]
    assert "refused" in found["AutoProcessor"] and "custom code" in found["AutoProcessor"], found


def test_what_is_opened_is_what_was_saved(folder, pair):
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer

    model, processor = pair
    clips = chosen([clip(20, 0), clip(30, 1)], "audiovisual")
    inputs = AutoProcessor.from_pretrained(folder)(**clips)
    assert all((inputs[name] == value).all() for name, value in processor(**clips).items())
    opened = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    ids = [m.generate(**inputs, max_new_tokens=5) for m in (model, opened)]
    assert ids[0].tolist() == ids[1].tolist()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()


# -- how it is done, on packages of our own ----------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`big.tables`, which `big.late` imports on its way, and `small.ours`, which needs all of `big.late`."""
    (tmp_path / "big").mkdir()
    (tmp_path / "small").mkdir()
    for name, text in {
        "big/__init__": "",
        "big/tables": "table = {}",
        "big/late": "import big.tables\nvalue = 1",
        "small/__init__": "",
        "small/ours": "from big.late import value\nfrom big.tables import table\ntable['ours'] = value",
        "small/broken": "import no_such_module",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(auto_classes, "PACKAGES", ("big", "small"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield monkeypatch
    for name in [name for name in sys.modules if name.partition(".")[0] in ("big", "small")]:
        del sys.modules[name]


@pytest.mark.parametrize("first", ["big.tables", "big.late", "small.ours", None])
def test_registration_waits_for_the_end_of_the_outermost_import(packages, first):
    from importlib import import_module

    packages.setattr(auto_classes, "REGISTERED_BY", {"big.tables": "small.ours"})
    if first is None:  # imported before this package
        import_module("big.tables")
    auto_classes.watch()
    table = import_module(first or "big.tables").__dict__.get("table") or sys.modules["big.tables"].table
    assert table == {"ours": 1}
    assert type(sys.modules["big.tables"].__spec__.loader).__name__ == "SourceFileLoader"


def test_what_cannot_register_does_not_stop_others_from_importing(packages):
    from importlib import import_module

    packages.setattr(auto_classes, "REGISTERED_BY", {"big.tables": "small.broken"})
    auto_classes.watch()
    assert import_module("big.tables").table == {}
