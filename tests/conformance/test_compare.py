"""The comparison with what is expected of transformers' tests sees every kind of change."""

import json

import pytest

from tests.conformance import __main__ as conformance


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "EXPECTED", tmp_path / "expected.json")
    conformance.EXPECTED.write_text(
        json.dumps(
            {
                "skipped": {"needs a GPU": ["Audio Video::test_gpu"]},
                "failed": {"refused on purpose": ["Audio::test_odd"]},
            }
        )
    )
    return conformance.expected()


FOUND = {
    "Audio::test_gpu": ("skipped", "needs a GPU"),
    "Audio::test_odd": ("failed", ""),
    "Audio::test_save": ("passed", ""),
}


def test_what_is_expected_is_no_difference(kept):
    assert conformance.differences(FOUND, kept) == []  # and nothing is asked of the variant that did not run


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"Audio::test_save": ("failed", "")}, "Audio::test_save: failed, expected passed"),
        ({"Audio::test_odd": ("passed", "")}, "Audio::test_odd: passed, expected failed (refused on purpose)"),
        ({"Audio::test_save": ("skipped", "why")}, "Audio::test_save: skipped, expected passed"),
        ({"Audio::test_gpu": None}, "Audio::test_gpu: is no test any more"),
        ({"Video::test_gpu": ("failed", "")}, "Video::test_gpu: failed, expected skipped (needs a GPU)"),
    ],
)
def test_every_change_is_a_line(kept, change, line):
    found = {name: outcome for name, outcome in (FOUND | change).items() if outcome is not None}
    assert conformance.differences(found, kept) == [line]


def test_a_new_failure_is_to_be_explained(kept):
    conformance.write(FOUND | {"Audio::test_save": ("failed", "")})
    kept = conformance.expected()
    assert kept["Audio::test_odd"] == ("failed", "refused on purpose")
    assert kept["Video::test_gpu"] == ("skipped", "needs a GPU")
    (line,) = conformance.differences(FOUND | {"Audio::test_save": ("failed", "")}, kept)
    assert "Audio::test_save: fails, and expected.json does not say why" in line


def test_every_kept_failure_has_its_reason():
    failed = json.loads((conformance.HERE / "expected.json").read_text())["failed"]
    assert conformance.UNEXPLAINED not in failed and all(len(reason) > 20 for reason in failed)
