"""Trainings write their reports without pictures; a test about those asks for `pictures`."""

import pytest

from llama_smop.reports import html, training
from tests.training.children import blank_picture


@pytest.fixture(scope="module", autouse=True)
def blank_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "picture", blank_picture)
        yield


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(training, "picture", html.picture)
