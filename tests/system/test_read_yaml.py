"""Files of settings that are hostile or broken: refused in a moment, in one line, by name."""

import pytest

from llama_smop.data.synthetic.grammar import CorpusError, Grammar
from llama_smop.models.formats.key_map import load_rules
from llama_smop.training.config import read_config

DOUBLED = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 28))
MERGED = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 28))
BAD = {
    "doubled": (DOUBLED, "more than 10000 values"),
    "merged": (MERGED, "more than 10000 values"),
    "itself": ("a: &a {b: *a}", "a value contains itself"),
    "deep": ("[\n" * 20_000, "nested too deeply"),  # in one line PyYAML looks for keys, for seconds
    "date": ("a: 2024-99-99", "not YAML|month"),
    "digits": ("a: " + "9" * 5000, "digits"),
    "bytes": (b"a: caf\xe9", "not UTF-8"),
    "tag": ("a: !!python/object/apply:os.system [true]", "not YAML"),
    "key": ("? {a: 1}\n: 2", "not YAML"),
    "binary": ("a: !!binary 'a'", "not YAML"),
    "large": ("a: " + "x" * 2**21, "larger than 1 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_whoever_reads_it(tmp_path, name):
    content, reason = BAD[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for read, error in ((read_config, ValueError), (load_rules, ValueError), (Grammar.from_file, CorpusError)):
        with pytest.raises(error, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_includes_that_double_and_that_lead_back_by_another_name(tmp_path):
    (tmp_path / "f0.yaml").write_text("model: {}")
    for n in range(1, 25):
        (tmp_path / f"f{n}.yaml").write_text(f"include: [f{n - 1}.yaml, f{n - 1}.yaml]")
    with pytest.raises(ValueError, match=r"f\d+\.yaml: more than 200 files are included"):
        read_config(tmp_path / "f24.yaml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "back.yaml").write_text("include: [sub/../back.yaml]")
    with pytest.raises(ValueError, match=r"back\.yaml: includes itself by way of \S*back\.yaml"):
        read_config(tmp_path / "back.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    (
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: .* finite"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: .* finite"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay: .* finite"),
        ("optimizer.epochs=.inf", "optimizer.epochs: .* finite"),
        ("model.load_balancing_coef=.inf", "load_balancing_coef: .* finite"),
        ("model.tiny.ctc_weight=.nan", "ctc_weight: .* finite"),
        ("model.tiny.max_seconds=.inf", "max_seconds: .* finite"),
        ("model.tiny.max_seconds=31", "max_seconds"),
        ("model.tiny.width=9", "model.tiny.width"),
        ("model.tiny.width=24", "model.tiny.width"),
        ("model.lora={}", "lora: not with tiny"),
        ("model.audio_tower=x", "audio_tower: not with tiny"),
        ("data.noise.snrs=[.nan]", "data.noise.snrs.0: .* finite"),
        ("data.noise.snrs=[1e9]", "data.noise.snrs.0"),
        ("data.stages=[{modalities: {audio: .inf}}]", "modalities.audio: .* finite"),
        ("a." * 3000 + "b=1", "the key has more than 20 parts"),
        ("model=" + "[\n" * 20_000, "nested too deeply"),
    ),
    ids=lambda text: text[:30],
)
def test_a_value_that_would_make_a_useless_training_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        read_config("demo", settings=[setting])
