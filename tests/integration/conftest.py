"""The engines of the tests here: each is started once, whatever the number of tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import ModelTrial, Trial, Trials
from sharp_model import write_sharp_model


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Trials]:
    """Runs trials."""
    model = tmp_path_factory.mktemp("sharp_model")
    write_sharp_model(model)
    trials = Trials(model, tmp_path_factory.mktemp("trials"), quick=pytestconfig.option.quick)
    yield trials
    trials.close()


@pytest.fixture(scope="module", autouse=True)
def _begin_trials(request: pytest.FixtureRequest) -> None:
    """Those that a file's tests are parametrised with begin at once, in the background.

    Not those of all files: each test process has collected all of them, and runs some.
    """
    here = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    parameters = (value for item in here for value in item.callspec.params.values())
    for trial in (value for value in parameters if isinstance(value, Trial | ModelTrial)):
        request.getfixturevalue("trials").begin(trial)
