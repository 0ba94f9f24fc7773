"""The constructed pairs are trained once for all tests of the doctor."""

import pytest

from tests.doctor.pairs import make_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"))
