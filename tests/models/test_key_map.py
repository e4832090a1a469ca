"""Rules that rename and stack tensors, and the account they leave."""

import pytest
import torch

from llama_smop.models.formats.key_map import KeyReport, Rule, load_rules, rename


def test_stacking_renaming_and_leaving_out():
    state = {
        "e.0.w": torch.zeros(2),
        "e.1.w": torch.ones(2),
        "same": torch.ones(1),
        "old": torch.ones(3),
        "junk": torch.ones(1),
    }
    rules = [Rule(r"e\.(\d)\.w", r"stack[\1]"), Rule("same", "same"), Rule("old", "new"), Rule("junk", None, "unused")]
    expected = {"stack": torch.Size([2, 2]), "same": torch.Size([1]), "new": torch.Size([3])}
    tensors, report = rename(state, rules, expected)
    assert torch.equal(tensors["stack"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert report == KeyReport(
        used=["same"],
        renamed={"e.0.w": "stack[0]", "e.1.w": "stack[1]", "old": "new"},
        left_out={"junk": "unused"},
    )


def test_the_first_rule_that_matches_wins_so_that_a_users_go_before():
    tensors, _ = rename({"a": torch.ones(1)}, [Rule("a", "mine"), Rule("a", "ours")], {"mine": torch.Size([1])})
    assert tensors.keys() == {"mine"}


def test_a_row_that_is_missing_or_too_many_is_reported():
    rules = [Rule(r"e(\d)", r"stack[\1+1]")]
    _, report = rename({"e0": torch.ones(2), "e5": torch.ones(2)}, rules, {"stack": torch.Size([3, 2])})
    assert report.missing == ["stack[0]", "stack[2]"]
    assert report.unexpected == ["e5"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(3)}, r"a has shape \(3,\), but t needs \(2,\)"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "two keys for t, the second is b"),
    ],
)
def test_misfits_are_named(state, message):
    with pytest.raises(ValueError, match=message):
        rename(state, [Rule("[ab]", "t")], {"t": torch.Size([2])})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pattern: a", "expected a list of rules"),
        ("- {target: a}", "rule 1 must have pattern"),
        ("- {pattern: a, target: b, colour: red}", "rule 1 must have pattern"),
        ("- {pattern: 'a('}", "no regular expression"),
        ("- {pattern: 5}", "pattern, target and why are text"),
        ("- {pattern: a, target: [b]}", "pattern, target and why are text"),
        (r"- {pattern: 'a(.)', target: 'b\2'}", "rule 1: .* is no target"),
        ("- {pattern: a", "not YAML"),
        ("", "expected a list of rules"),
    ],
)
def test_a_bad_key_map_file_is_refused(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rules(tmp_path / "map.yaml")
