"""Trainings write their reports without pictures; a test about those asks for `pictures`."""

from types import SimpleNamespace

import pytest
from accelerate.utils import memory

from llama_smop.reports import html, training
from tests.training.children import blank_picture


@pytest.fixture(scope="module", autouse=True)
def blank_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "picture", blank_picture)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_collection_of_garbage():
    """A Trainer collects at its end, which walks through all that the worker has imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(training, "picture", html.picture)
