"""The models of `real.py` as fixtures."""

import pytest

from tests.robustness.real import as_loaded, given_back


@pytest.fixture(params=["smollm2", pytest.param("gemma3-270m", marks=pytest.mark.wide)])
def real(request):
    with given_back(as_loaded(request.param)) as found:
        yield found


@pytest.fixture
def smollm2():
    with given_back(as_loaded("smollm2")) as found:
        yield found


@pytest.fixture
def whole_smollm2():
    with given_back(as_loaded("smollm2", None)) as found:
        yield found
