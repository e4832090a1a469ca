"""Trainings write their reports without pictures; test_record.py, about the reports, has them drawn."""

import pytest

from llama_smop.reports import training
from tests.training.children import blank_picture


@pytest.fixture(scope="module", autouse=True)
def blank_pictures(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_record.py":
            patch.setattr(training, "picture", blank_picture)
        yield
