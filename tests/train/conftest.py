"""What the tests of real runs share."""

import pytest
from tiny_model import make_data, make_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a tiny model, file of rows): enough for a run of seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_model(folder / "model"), make_data(folder / "rows.jsonl")
