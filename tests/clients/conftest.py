"""What the tests of this directory share."""

import pytest

from support.service import Service
from support.streams import RawClient


@pytest.fixture
def raw(service: Service) -> RawClient:
    """A client that sends exactly the bytes it is told to."""
    return RawClient(service.socket)
