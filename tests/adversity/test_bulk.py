"""Streams that the kernel moves, through the real thing: the docker CLI, and reloads in the midst of frames."""

import hashlib
import subprocess
import threading
from collections.abc import Callable

import pytest

from support.runtimes import TestContainer
from support.service import Service

NewService = Callable[..., Service]

NUMBERS = 8_000_000
"""Lines of `seq`: 63 MB."""

BLOCK = bytes(range(256)) * 4096
BLOCKS = 100
"""Of 1 MiB."""

RELOADS = 4


@pytest.fixture
def bulky(new_service: NewService) -> Service:
    return new_service()


def test_output_across_reloads(bulky: Service, container: TestContainer) -> None:
    """The client reads on and on; each reload comes when so much more has passed, wherever in a frame that is."""
    expected = hashlib.sha256()
    for begin in range(1, NUMBERS + 1, 100_000):
        expected.update("".join(f"{number}\n" for number in range(begin, begin + 100_000)).encode())
    argv = ["docker", "-H", bulky.host, "exec", container.id, "seq", "1", str(NUMBERS)]
    digest = hashlib.sha256()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(RELOADS):
            for _ in range(100):
                digest.update(process.stdout.read(50_000))
            bulky.reload()
        while piece := process.stdout.read(1 << 16):
            digest.update(piece)
        assert (process.wait(), process.stderr.read()) == (0, b"")
    assert digest.digest() == expected.digest()
    bulky.assert_clean_log()


def test_input_across_reloads(bulky: Service, container: TestContainer) -> None:
    expected = hashlib.sha256()
    for _ in range(BLOCKS):
        expected.update(BLOCK)
    argv = ["docker", "-H", bulky.host, "exec", "-i", container.id, "sha256sum"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        passed = threading.Semaphore(0)

        def send() -> None:
            for _ in range(BLOCKS):
                stdin.write(BLOCK)
                passed.release()
            stdin.close()

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(RELOADS):
            for _ in range(BLOCKS // (RELOADS + 1)):
                passed.acquire()
            bulky.reload()
        sender.join()
        output, errors = stdout.read(), stderr.read()
        assert (process.wait(), errors) == (0, b"")
    assert output.split()[0].decode() == expected.hexdigest()
    bulky.assert_clean_log()
