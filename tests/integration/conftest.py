"""The engines of the tests here: each is started once, whatever the number of tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import ModelTrial, Trial, Trials
from sharp_model import write_sharp_model


@pytest.fixture(scope="session")
def trials(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    """Runs trials. Those that the collected tests are parametrised with begin at once, in the background."""
    model = tmp_path_factory.mktemp("sharp_model")
    write_sharp_model(model)
    trials = Trials(model, tmp_path_factory.mktemp("trials"))
    for item in request.session.items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for trial in (value for value in parameters if isinstance(value, Trial | ModelTrial)):
            trials.begin(trial)
    yield trials
    trials.close()
