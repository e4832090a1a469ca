import pytest

from llama_smop.evaluation.wer import word_errors


def test_errors_are_summed_over_clips_not_averaged():
    errors = word_errors(["a b c d", "e"], ["a b c d", "x"])
    assert (errors.errors, errors.words, errors.wer) == (1, 5, 0.2)


def test_case_and_spacing_do_not_count_but_order_does():
    assert word_errors(["Set  Blue AT a"], ["set blue at A"]).wer == 0
    assert word_errors(["a b"], ["b a"]).wer == 1


def test_each_kind_of_error_is_counted():
    errors = word_errors(["a b c d"], ["a x c d e"])
    assert (errors.substitutions, errors.deletions, errors.insertions) == (1, 0, 1)
    assert word_errors(["a b"], [""]).deletions == 2


def test_words_heard_in_a_silent_clip_are_insertions():
    errors = word_errors(["", "a b"], ["c d e", "a b"])
    assert (errors.insertions, errors.words) == (3, 2)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="one hypothesis for each of 1"):
        word_errors(["a"], [])
    with pytest.raises(ValueError, match="no word"):
        word_errors([""], [""])
