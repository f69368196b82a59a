"""What the tests of this directory share."""

import pytest

from support.api import RawApi
from support.service import Service


@pytest.fixture
def raw(service: Service) -> RawApi:
    """A client that sends exactly the bytes it is told to."""
    return RawApi(service.socket)
