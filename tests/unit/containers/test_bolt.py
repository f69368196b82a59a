"""The reader of bolt databases, against files of a small writer, against damage, and against a real podman."""

import contextlib
import json
import os
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execgate.containers import bolt
from execgate.containers.bolt import Bucket, read
from execgate.model.errors import Internal, NotFound, Unavailable
from support.bolt import BoltPages, Tree, bolt_file, meta_page, write_bolt
from support.programs import find_program

SMALL = 1024
"""The smallest page size; it makes deep trees of few keys."""

MANY: dict[bytes, bytes] = {b"key%06d" % number: b"value%d" % number for number in range(0, 20_000, 2)}


def everything(bucket: Bucket) -> dict[bytes, Any]:
    """Read a bucket with all below it."""
    return dict(bucket.items()) | {name: everything(inner) for name, inner in bucket.buckets()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "meta.db"


# -- the form


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("page_size", [SMALL, 4096, 65536])
@pytest.mark.parametrize(
    "tree",
    [
        {},
        {b"a": b"1"},
        {b"a": b"", b"b": {}},
        {b"v1": {b"default": {b"containers": {b"id": {b"image": b"busy", b"labels": {b"a": b"b"}}}}}},
        {b"big": b"x" * 300_000, b"bigger": {b"small": b"", b"y": b"y" * 200_000}},
        {b"many": MANY, b"after": b"z"},
        {b"n%d" % number: {b"in": b"%d" % number} for number in range(300)},
    ],
    ids=["empty", "one", "empties", "nested", "overflow", "branches", "buckets"],
)
def test_all_that_is_in_it(file: Path, tree: Tree, page_size: int, inline: bool) -> None:
    write_bolt(file, tree, page_size=page_size, inline=inline)
    assert read(file, everything) == tree
    assert read(file, lambda root: [key for key, _ in root.items()]) == sorted(
        key for key, value in tree.items() if isinstance(value, bytes)
    )


def test_look_ups(file: Path) -> None:
    write_bolt(file, {b"v1": {b"ns": {b"image": b"busy", b"labels": {b"a": b"b"}}}, b"z": b"last"})
    assert read(file, lambda root: root.get(b"v1", b"ns", b"image")) == b"busy"
    assert read(file, lambda root: root.get(b"v1", b"ns", b"labels", b"a")) == b"b"
    assert read(file, lambda root: root.get(b"z")) == b"last"
    for path in [(b"v1",), (b"v1", b"none"), (b"none", b"ns"), (b"v1", b"ns", b"image", b"x"), (b"",), (b"zz",)]:
        assert read(file, lambda root, path=path: root.get(*path)) is None  # type: ignore[misc]
    for path in [(b"z",), (b"none",), (b"v1", b"ns", b"image"), (b"z", b"v1")]:
        assert read(file, lambda root, path=path: root.bucket(*path)) is None  # type: ignore[misc]


@pytest.mark.parametrize("page_size", [SMALL, 4096])
def test_keys_in_branches(file: Path, page_size: int) -> None:
    write_bolt(file, {b"many": MANY}, page_size=page_size)

    def all_of(root: Bucket) -> list[bytes | None]:
        bucket = root.bucket(b"many")
        assert bucket is not None
        return [bucket.get(b"key%06d" % number) for number in range(-1, 20_001)]

    assert read(file, all_of) == [MANY.get(b"key%06d" % number) for number in range(-1, 20_001)]


def test_a_look_up_reads_few_pages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bolt(file, {b"many": MANY})
    # The root, then branch, leaf: far from the 80 pages of the file.
    monkeypatch.setattr(bolt, "MAX_BYTES", 4 * 4096 + 4096)
    assert read(file, lambda root: root.get(b"many", b"key010000")) == b"value10000"
    with pytest.raises(Internal, match="cannot be read") as caught:
        read(file, everything)
    assert "takes more than" in caught.value.hint


KEYS = st.binary(min_size=1, max_size=40)


@settings(max_examples=60)
@given(
    tree=st.recursive(
        st.dictionaries(KEYS, st.binary(max_size=600), max_size=40),
        lambda inner: st.dictionaries(KEYS, st.one_of(st.binary(max_size=600), inner), max_size=8),
        max_leaves=6,
    ),
    others=st.lists(KEYS, max_size=20),
    inline=st.booleans(),
)
def test_like_a_dict(tree: dict[bytes, Any], others: list[bytes], inline: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write_bolt(Path(directory) / "db", tree, page_size=SMALL, inline=inline)
        assert read(file, everything) == tree
        for key in {*tree, *others}:
            expected = tree.get(key)
            assert read(file, lambda root, key=key: root.get(key)) == (  # type: ignore[misc]
                expected if isinstance(expected, bytes) else None
            )
            assert (read(file, lambda root, key=key: root.bucket(key)) is not None) == isinstance(  # type: ignore[misc]
                expected, dict
            )


# -- a writer at work


def commit(file: Path, tree: Tree, txid: int) -> None:
    """Write state `txid` as hard as bbolt ever may: over all pages of the state before the last, then its meta."""
    pages = BoltPages(first=3 if txid % 2 else 503)
    root = pages.add(tree)
    with file.open("r+b") as opened:
        os.pwrite(opened.fileno(), pages.data, (3 if txid % 2 else 503) * 4096)
        os.fdatasync(opened.fileno())
        os.pwrite(opened.fileno(), meta_page(root, txid), txid % 2 * 4096)
        os.fdatasync(opened.fileno())


def state(number: int) -> dict[bytes, Any]:
    """A state with the same number all over, in the order of the pages that a walk reads."""
    filled = {b"%d" % key: b"%d" % number * 300 for key in range(40)}
    return {b"a": b"%d" % number, b"b": filled, b"c": filled, b"d": b"%d" % number}


def test_the_newest_state(file: Path) -> None:
    write_bolt(file, state(1), txid=1)
    first = read(file, lambda root: root.version)
    for txid in (2, 3, 4):
        commit(file, state(txid), txid)
        assert read(file, everything) == state(txid)
        assert read(file, lambda root: root.version) == (*first[:2], txid)


@pytest.mark.parametrize("txid", [2, 3])
@pytest.mark.parametrize("written", [0, 20, 60, 79])
def test_a_meta_page_half_written(file: Path, txid: int, written: int) -> None:
    write_bolt(file, state(1), txid=1)
    for number in range(2, txid + 1):
        commit(file, state(number), number)
    # The next one's pages are there, and its meta page is not yet.
    with file.open("r+b") as opened:
        old = os.pread(opened.fileno(), 4096, (txid + 1) % 2 * 4096)
        os.pwrite(opened.fileno(), meta_page(999, txid + 1)[:written] + old[written:], (txid + 1) % 2 * 4096)
    assert read(file, everything) == state(txid)


def test_the_question_is_asked_again(file: Path) -> None:
    write_bolt(file, state(1), txid=1)
    numbers = iter([2, 3])

    def ask(root: Bucket) -> tuple[bytes | None, bytes | None]:
        before = root.get(b"a")
        for number in numbers:
            commit(file, state(number), number)
            break
        return before, root.get(b"d")

    assert read(file, ask) == (b"3", b"3")


def test_what_is_raised_counts_only_of_a_state_that_stood(file: Path) -> None:
    write_bolt(file, state(1), txid=1)
    asked = []

    def ask(root: Bucket) -> None:
        asked.append(root.get(b"a"))
        if len(asked) == 1:
            commit(file, state(2), 2)
        raise LookupError(f"round {len(asked)}")

    with pytest.raises(LookupError, match="round 2"):
        read(file, ask)
    assert asked == [b"1", b"2"]


def test_a_file_that_always_changes(file: Path) -> None:
    write_bolt(file, state(1), txid=1)
    numbers = iter(range(2, 1000))
    with pytest.raises(Unavailable) as caught:
        read(file, lambda _: commit(file, state(0), next(numbers)))
    assert str(file) in caught.value.hint
    assert next(numbers) < 100


def test_a_busy_writer(file: Path) -> None:
    """Whatever is answered is one state, and the states go forward."""
    write_bolt(file, state(1), txid=1)
    stop = threading.Event()

    def work() -> None:
        txid = 2
        while not stop.is_set():
            commit(file, state(txid), txid)
            txid += 1

    writer = threading.Thread(target=work)
    writer.start()
    seen: list[int] = []
    try:
        while len(set(seen)) < 30:
            with contextlib.suppress(Unavailable):
                answer = read(file, everything)
                number = int(answer[b"a"])
                assert answer == state(number)
                seen.append(number)
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen)


def test_nothing_outlives_the_question(file: Path) -> None:
    write_bolt(file, state(1))
    bucket = read(file, lambda root: root)
    items = read(file, lambda root: root.items())
    with pytest.raises(ValueError, match="closed"):
        bucket.get(b"a")
    with pytest.raises(ValueError, match="closed"):
        list(items)


# -- damage


def small_file() -> bytearray:
    """A database with every kind of page, about a dozen of them."""
    many = {b"key%04d" % number: b"v" * 30 for number in range(60)}
    return bytearray(bolt_file({b"in": {b"a": b"b"}, b"many": many, b"over": b"x" * 1500}, page_size=SMALL))


def walk(file: Path) -> None:
    """Read all there is in each way; only Internal may come of it."""
    for question in (everything, lambda root: root.get(b"many", b"key0030"), lambda root: root.get(b"in", b"a")):
        with contextlib.suppress(Internal):
            read(file, question)


def test_cut_off(file: Path) -> None:
    whole = small_file()
    for size in [*range(0, len(whole), SMALL // 2), 79, 80, SMALL + 79, SMALL + 80, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(Internal, match="cannot be read") as caught:
            read(file, everything)
        assert str(file) in caught.value.hint


def test_any_one_byte(file: Path) -> None:
    whole = small_file()
    file.write_bytes(whole)
    with file.open("r+b", buffering=0) as opened:
        # The headers and elements of each page, and some of what follows; values may be anything.
        for offset in (page + at for page in range(0, len(whole), SMALL) for at in range(160)):
            for flip in (0x01, 0x80, 0xFF):
                os.pwrite(opened.fileno(), bytes([whole[offset] ^ flip]), offset)
                walk(file)
            os.pwrite(opened.fileno(), whole[offset : offset + 1], offset)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(2 * SMALL, len(small_file()) - 8), st.binary(min_size=1, max_size=8)), min_size=1)
)
def test_any_damage_below_the_meta_pages(changes: list[tuple[int, bytes]]) -> None:
    data = small_file()
    for offset, patch in changes:
        data[offset : offset + len(patch)] = patch
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "db"
        file.write_bytes(data)
        walk(file)


@given(st.binary(max_size=4 * SMALL))
@settings(max_examples=50)
def test_no_database(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "db"
        file.write_bytes(data)
        with pytest.raises(Internal, match="cannot be read"):
            read(file, everything)


def page(page_id: int, flags: int, *elements: bytes) -> bytes:
    """A page of elements that are given as their 16 bytes; there are no keys."""
    return (struct.pack("=QHHI", page_id, flags, len(elements), 0) + b"".join(elements)).ljust(SMALL, b"\0")


def leads_to(page_id: int) -> bytes:
    return struct.pack("=IIQ", 0, 0, page_id)


BUCKET_OF_PAGE_3 = page(3, 2, struct.pack("=IIII", 1, 16, 0, 16))[:32] + struct.pack("=QQ", 3, 0)

CRAFTED = {
    "branch cycle": (page(3, 1, leads_to(3)), "too deep"),
    "wide branch cycle": (page(3, 1, *[leads_to(3)] * 60), "too deep"),
    "bucket in itself": (BUCKET_OF_PAGE_3, "too deep"),
    "a meta page as a tree": (page(3, 1, leads_to(0)), "page 0 is outside"),
    "beyond the end": (page(3, 1, leads_to(2**64 - 1)), "is outside"),
    "no children": (page(3, 1), "neither"),
    "a freelist": (page(3, 16), "neither"),
    "another page": (page(4, 2), "says that it is page 4"),
    "an overflow beyond the end": (struct.pack("=QHHI", 3, 2, 0, 2**32 - 1), "is outside"),
    "more elements than room": (struct.pack("=QHHI", 3, 2, 64, 0), "too many"),
    "a key outside": (page(3, 2, struct.pack("=IIII", 0, 16, 2000, 0)), "ends outside"),
    "a value outside": (page(3, 2, struct.pack("=IIII", 0, 2**32 - 1, 0, 1)), "ends outside"),
    "a bucket without header": (page(3, 2, struct.pack("=IIII", 1, 16, 0, 15)), "no header"),
    "an inline bucket without page": (page(3, 2, struct.pack("=IIII", 1, 16, 0, 31)), "no header"),
}


@pytest.mark.parametrize(("root", "reason"), CRAFTED.values(), ids=CRAFTED)
def test_crafted(file: Path, root: bytes, reason: str) -> None:
    metas = meta_page(3, 2, page_size=SMALL) + meta_page(3, 1, page_size=SMALL)
    file.write_bytes(metas + page(2, 16) + root.ljust(SMALL, b"\0"))
    with pytest.raises(Internal) as caught:
        read(file, everything)
    assert reason in caught.value.hint
    assert str(file) in caught.value.hint


def test_one_element_many_times_over(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 64 KiB that would unfold to 4 MB."""
    monkeypatch.setattr(bolt, "MAX_BYTES", 1 << 20)
    element = struct.pack("=IIII", 0, 0, 0, 1000)
    root = (struct.pack("=QHHI", 3, 2, 4000, 63) + element * 4000).ljust(64 * SMALL, b"\0")
    metas = meta_page(3, 2, page_size=SMALL) + meta_page(3, 1, page_size=SMALL)
    file.write_bytes(metas + page(2, 16) + root)
    with pytest.raises(Internal) as caught:
        read(file, lambda bucket: sum(1 for _ in bucket.items()))
    assert "takes more than" in caught.value.hint


@pytest.mark.parametrize("change", [{"magic": 1}, {"version": 3}, {"page_size": 1000}, {"page_size": 1 << 25}])
def test_meta_pages_of_another_kind(file: Path, change: dict[str, int]) -> None:
    metas = [meta_page(3, txid, **{"page_size": SMALL} | change)[:SMALL].ljust(SMALL, b"\0") for txid in (2, 1)]
    file.write_bytes(b"".join(metas) + page(2, 16) + page(3, 2))
    with pytest.raises(Internal) as caught:
        read(file, everything)
    assert "no meta page" in caught.value.hint


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    write_bolt(tmp_path / "db", {})
    (tmp_path / "link").symlink_to("db")
    with pytest.raises(NotFound):
        read(tmp_path / "none", everything)
    for name in ("fifo", ".", "link"):
        with pytest.raises(Internal):
            read(tmp_path / name, everything)


# -- a real writer


class Podman:
    """A podman whose every file is below one directory, on bolt wherever it still lets one choose."""

    def __init__(self, directory: Path) -> None:
        self.database = directory / "graph/libpod/bolt_state.db"
        self._program = find_program("podman")
        self._environment = {
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "CI_DESIRED_DATABASE": "boltdb",  # podman 5 makes no new one without
        }
        (directory / "containers.conf").write_text(
            '[engine]\nevents_logger = "none"\nlock_type = "file"\ndatabase_backend = "boltdb"\n'
            f'cgroup_manager = "cgroupfs"\ntmp_dir = "{directory}/tmp"\n'
        )
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n'
        )

    def run(self, *arguments: str | Path) -> str:
        argv = [self._program, *arguments]
        environment = os.environ | self._environment
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    directory = tmp_path_factory.mktemp("podman")
    (directory / "rootfs").mkdir()
    return Podman(directory)


def test_podman_s_own_file(podman: Podman) -> None:
    rootfs = podman.database.parents[2] / "rootfs"
    options = ["--network=none", "--label=a=b", "--stop-timeout=7", "--name=one"]
    made = podman.run("create", *options, "--rootfs", rootfs, "true").encode()

    def config(root: Bucket) -> bytes | None:
        return root.get(b"ctr", root.get(b"name-registry", b"one") or b"", b"config")

    found = json.loads(read(podman.database, config) or b"")
    assert (found["id"], found["labels"], found["stopTimeout"]) == (made.decode(), {"a": "b"}, 7)
    podman.run("rm", "one")
    assert read(podman.database, config) is None


def test_podman_at_work(podman: Podman) -> None:
    """A volume is in both of the buckets that one transaction of podman writes, or in none."""
    podman.run("volume", "create", "first")
    names = [f"v{number}" for number in range(12)]

    def work() -> None:
        for name in names:
            podman.run("volume", "create", name)
        podman.run("volume", "rm", "--all")

    writer = threading.Thread(target=work)
    writer.start()
    seen = set()
    while True:
        at_work = writer.is_alive()
        seen.add(read(podman.database, volumes))
        if not at_work:
            break
    writer.join()
    assert len(seen) > len(names)
    assert read(podman.database, volumes) == ()


def volumes(root: Bucket) -> tuple[bytes, ...]:
    listed, registered = root.bucket(b"allVolumes"), root.bucket(b"vol")
    assert listed is not None
    assert registered is not None
    names = tuple(name for name, _ in listed.items())
    described = {name: json.loads(inner.get(b"config") or b"")["name"].encode() for name, inner in registered.buckets()}
    assert described == {name: name for name in names}
    return names
