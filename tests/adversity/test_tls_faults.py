"""Rows 25 and 26 of the fault matrix, and what else TLS adds: ends that are none, reloads, certificates, floods."""

import contextlib
import hashlib
import os
import resource
import select
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.access import EVERYTHING, rule, write_policy
from support.api import RawApi
from support.leaks import resident_bytes
from support.notify import NotifySocket
from support.raw import Connection
from support.runtimes import RuntimeHost, TestContainer
from support.service import POLICY, Service, execgate_program, write_config
from support.tls import Authority, TlsSocket, TlsTarget
from support.tls_service import EVERYBODY, TlsService, await_log, free_port
from support.unharmed import unharmed_service

NewTls = Callable[..., TlsService]


@pytest.fixture
def unharmed(tls: TlsService, runc_container: TestContainer) -> Iterator[None]:
    """What must hold after every fault, for the shared service with TLS."""
    with unharmed_service(tls.service, runc_container):
        yield


@pytest.fixture
def api(tls: TlsService) -> RawApi:
    return RawApi(tls.target())


def wire(connection: Connection) -> TlsSocket:
    assert isinstance(connection.socket, TlsSocket)
    return connection.socket


def cut(connection: Connection) -> bool:
    """Whether a connection ends, and in no way that could pass for an end."""
    try:
        connection.read_to_end()
    except ConnectionError:
        return True
    return False


# -- row 25: an end of input is no end of output


def test_half_close_while_output_flows(api: RawApi, container: TestContainer, unharmed: None) -> None:
    script = "echo up; cat; echo over; seq 100000; echo late >&2; exit 4"
    with api.open(container.id, "sh", "-c", script, stdin=True) as session:
        assert session.output_until(b"up\n") == b"up\n"
        session.send(b"typed\n")
        session.half_close()
        stdout, stderr = session.output()
        assert session.exit_code() == 4
    assert stdout == b"typed\nover\n" + b"".join(b"%d\n" % number for number in range(1, 100001))
    assert stderr == b"late\n"


def test_the_end_of_input_with_the_request(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """Request, input and close_notify in one piece, before anything was answered."""
    data = os.urandom(40_000)
    done = api.pipe(container.id, "sh", "-c", "sleep 0.2; sha256sum", stdin=data)
    assert (done.stdout.split()[0].decode(), done.exit_code) == (hashlib.sha256(data).hexdigest(), 0)


def test_input_and_its_end_byte_by_byte(api: RawApi, runc_container: TestContainer, unharmed: None) -> None:
    """Records in pieces of one byte, both ways open until both are over."""
    data = os.urandom(20_000)
    with api.open(runc_container.id, "cat", stdin=True) as session:
        socket_ = wire(session.connection)
        socket_.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(data), 5000):
            for byte in socket_.records(data[begin : begin + 5000]):
                socket_.tcp.sendall(bytes([byte]))
        session.half_close()
        assert session.output() == (data, b"")
        assert session.exit_code() == 0


# -- row 26: an end that is not said


@pytest.mark.parametrize("how", ["FIN", "RST", "half a record, FIN"])
def test_an_abort_is_no_end_of_input(api: RawApi, container: TestContainer, unharmed: None, how: str) -> None:
    """The process keeps its stdin, as its creator wanted for a client that is lost, and not for one that is done."""
    with api.open(container.id, "sh", "-c", "cat; echo over", stdin=True, OnDisconnect="keep") as session:
        assert session.echo(b"one\n") == b"one\n"
        tcp = wire(session.connection).tcp
        if how.startswith("half"):
            tcp.sendall(wire(session.connection).records(b"x" * 1000)[:500])
        if how == "RST":
            wire(session.connection).reset()
        else:
            tcp.shutdown(socket.SHUT_WR)
            assert cut(session.connection)
    with api.reattach(session.id) as again:
        assert again.echo(b"two\n") == b"two\n"
        again.half_close()
        assert again.output() == (b"over\n", b"")
        assert again.exit_code() == 0


def test_an_abort_is_a_lost_client(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """Noticed at once, over TCP too, while nothing moves in either direction."""
    with api.open(container.id, "sleep", "1000", stdin=True, OnDisconnect="kill") as session:
        wire(session.connection).tcp.shutdown(socket.SHUT_WR)
        assert api.wait_stopped(session.id)["ExitCode"] == 137
    with api.open(container.id, "sleep", "1000", stdin=True, OnDisconnect="kill") as session:
        session.half_close()  # is none
        time.sleep(0.3)
        assert api.inspect(session.id)["Running"]
        wire(session.connection).reset()
        assert api.wait_stopped(session.id)["ExitCode"] == 137


def test_what_was_sent_before_an_abort_arrives(api: RawApi, container: TestContainer, unharmed: None) -> None:
    """And then, as its creator did not choose otherwise, the end."""
    with api.open(container.id, "sh", "-c", "wc -c > /tmp/got", stdin=True) as session:
        session.send(b"x" * 300_000)
        wire(session.connection).tcp.shutdown(socket.SHUT_WR)
        assert api.wait_stopped(session.id)["ExitCode"] == 0
    assert int((container.rootfs / "tmp/got").read_text()) == 300_000
    (container.rootfs / "tmp/got").unlink()


def test_an_abort_within_a_request(api: RawApi, unharmed: None) -> None:
    with api.connect() as connection:
        connection.send(b"POST /containers/x/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wire(connection).tcp.shutdown(socket.SHUT_WR)
        assert cut(connection)


# -- bounds


def test_stdin_that_nobody_reads(api: RawApi, tls: TlsService, runc_container: TestContainer, unharmed: None) -> None:
    """Row 28: what is in flight is what TCP itself takes; none of it is in the service's memory."""
    before = resident_bytes(tls.service)
    with api.open(runc_container.id, "sh", "-c", "printf up; exec sleep 1000", stdin=True) as session:
        session.connection.read_exactly(10)
        sent = wire(session.connection).send_until_blocked(b"x" * 65536, patience=0.7, most=200_000_000)
        assert sent < 24_000_000, f"{sent} bytes are in flight"
        assert resident_bytes(tls.service) - before < 8 << 20
        os.kill(api.inspect(session.id)["Pid"], signal.SIGKILL)
        assert session.output() == (b"", b"")
        assert session.exit_code() == 137


def test_slow_reader_of_much_output(
    api: RawApi, tls: TlsService, runc_container: TestContainer, unharmed: None
) -> None:
    """Row 23."""
    line, size = b"0123456789abcdef\n", 100_000_000
    script = f"yes {line.decode().strip()} | head -c {size}; exit 6"
    before, taken = resident_bytes(tls.service), b""
    with api.open(runc_container.id, "sh", "-c", script) as session:
        for _ in range(3):
            taken += session.connection.read_exactly(1024)
            time.sleep(1)  # this is the slowness, nothing is waited for
        assert api.inspect(session.id)["StdoutBytes"] < 24_000_000
        assert resident_bytes(tls.service) - before < 16 << 20
        session.connection.unread(taken)
        digest = hashlib.sha256()
        for _, piece in session.pieces():
            digest.update(piece)
        assert session.exit_code() == 6
    assert digest.digest() == hashlib.sha256((line * (size // len(line) + 1))[:size]).digest()


def test_2000_connections_without_a_handshake(api: RawApi, tls: TlsService, unharmed: None) -> None:
    """Row 31: silent, and with half a hello; all are closed, and whoever has something to say is heard meanwhile."""
    begun = time.monotonic()
    hello = _client_hello(tls.target())
    silent = [socket.create_connection(("127.0.0.1", tls.port)) for _ in range(2000)]
    try:
        for connection in silent[::2]:
            with contextlib.suppress(ConnectionError):  # it had to make room already
                connection.sendall(hello[: len(hello) // 2])
        opened = time.monotonic() - begun
        poll = select.poll()
        left = {connection.fileno(): connection for connection in silent}
        for fd in left:
            poll.register(fd, select.POLLIN | select.POLLHUP)
        pings: list[float] = []
        while left and time.monotonic() - begun < 30:
            before = time.monotonic()
            assert api.call("GET", "/_ping").body == b"OK"
            pings.append(time.monotonic() - before)
            for fd, _ in poll.poll(10):
                if _has_ended(left[fd]):
                    poll.unregister(fd)
                    del left[fd]
        took = time.monotonic() - begun
    finally:
        for connection in silent:
            connection.close()
    p50, p99 = statistics.median(pings), statistics.quantiles(pings, n=100)[98]
    print(f"opened in {opened:.2f} s, closed after {took:.2f} s; /_ping p50 {p50:.4f} p99 {p99:.4f} s n={len(pings)}")
    assert not left, f"{len(left)} connections were still open after {took:.1f} s"
    assert p99 < 1


def _client_hello(target: TlsTarget) -> bytes:
    records = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        target.context.wrap_bio(ssl.MemoryBIO(), records, server_hostname="127.0.0.1").do_handshake()
    return records.read()


def _has_ended(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def test_no_more_descriptors(new_tls: NewTls, runc_container: TestContainer) -> None:
    """Row 16: connections wait where they are, nothing spins, and it recovers by itself."""
    tls = new_tls(standby="false")
    api = RawApi(tls.target())
    assert api.call("GET", "/_ping").body == b"OK"
    pid = tls.service.pid
    opened = len(os.listdir(f"/proc/{pid}/fd"))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + 1, before[1]))
    waiting = [socket.create_connection(("127.0.0.1", tls.port)) for _ in range(5)]
    await_log(tls.service, "no connection can be accepted")
    began = _cpu_seconds(pid)
    time.sleep(1.5)
    assert _cpu_seconds(pid) - began < 0.75, "it spins"
    for connection in waiting:
        connection.close()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert api.call("GET", "/_ping").body == b"OK"
    done = api.pipe(runc_container.id, "cat", stdin=b"all")
    assert (done.stdout, done.exit_code) == (b"all", 0)
    tls.service.assert_clean_log()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- reloads, crashes, ends

COUNT = "i=0; while [ $i -lt 60000 ]; do echo line $i of the output; i=$((i+1)); done; read end; exit 5"
COUNTED = b"".join(b"line %d of the output\n" % number for number in range(60000))


@pytest.mark.parametrize("fault", ["reload", "crash", "stop"])
def test_a_stream_is_cut_and_its_session_lives(
    new_tls: NewTls, new_service: Callable[..., Service], container: TestContainer, fault: str
) -> None:
    """Nobody takes the cut for the end, and whoever attaches again has every byte of what is captured."""
    tls = new_tls()
    api = RawApi(tls.target())
    with api.open(container.id, "sh", "-c", COUNT, stdin=True, CaptureStdout=True, OnDisconnect="keep") as session:
        session.connection.read_exactly(100_000)
        if fault == "stop":
            tls.service.stop()
        else:
            getattr(tls.service, fault)()
        assert cut(session.connection)
    if fault == "stop":
        flags, env = [f"--listen=tls://127.0.0.1:{tls.port}", f"--listen={tls.service.host}"], _settings(tls)
        new_service(tls.service.directory, flags=flags, env=env)
    with api.reattach(session.id, after=0) as again:
        again.send(b"end\n")
        stdout, _ = again.output()
        assert again.exit_code() == 5
    assert stdout == COUNTED


def _settings(tls: TlsService) -> dict[str, str]:
    """Its files, for the environment of another service."""
    return {
        "EXECGATE_TLS_CERTIFICATE": str(tls.server.certificate),
        "EXECGATE_TLS_KEY": str(tls.server.key),
        "EXECGATE_TLS_CLIENT_CA": str(tls.authority.ca),
    }


def test_idle_connections_are_told(new_tls: NewTls) -> None:
    """Nothing is owed on them, so their end is one, and no client need wonder."""
    tls = new_tls()
    api = RawApi(tls.target())
    with api.connect() as idle, api.connect() as other:
        for one in (idle, other):
            assert one.request("GET", "/_ping").headers.get("connection") != "close"
        tls.service.reload()
        assert idle.read_to_end() == b""
        assert other.read_to_end() == b""
    tls.service.assert_clean_log()


def test_requests_under_reloads(new_tls: NewTls) -> None:
    """A connection may be cut in a reload, and is then no answer; what is answered is answered whole."""
    tls = new_tls()
    api = RawApi(tls.target())
    over = threading.Event()

    def ask() -> tuple[int, int]:
        answered = lost = 0
        while not over.is_set():
            try:
                answer = api.call("GET", "/version")
            except (OSError, EOFError):
                lost += 1
            else:
                assert answer.status == 200
                assert answer.json["ApiVersion"]
                answered += 1
        return answered, lost

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            for _ in range(5):
                tls.service.reload()
        finally:
            over.set()
        results = [one.result() for one in clients]
    print(f"answered and lost under 5 reloads: {results}")
    assert all(answered > 5 * lost for answered, lost in results)
    tls.service.assert_clean_log()


def serial(tls: TlsService) -> str:
    """The serial number of the certificate that the service shows now."""
    with tls.target().connect() as client:
        certificate = client.tls.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def reload(tls: TlsService) -> "subprocess.CompletedProcess[str]":
    argv = [str(execgate_program()), "reload", f"--state-dir={tls.service.state_dir}"]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def test_a_reload_has_the_new_certificate(new_tls: NewTls) -> None:
    tls = new_tls()
    before = serial(tls)
    tls.authority.server("server", "localhost", "127.0.0.1")
    assert serial(tls) == before, "nobody has asked for it yet"
    assert reload(tls).returncode == 0
    after = serial(tls)
    assert after != before
    tls.service.crash()
    assert serial(tls) == after


def test_a_reload_has_the_new_authority(new_tls: NewTls, tmp_path: Path) -> None:
    """Who was let in is not any more, and who was not is."""
    tls = new_tls()
    other = Authority.make(tmp_path / "pki")
    bob = other.client("bob", "bob@example.org")
    alice, stranger = RawApi(tls.target()), RawApi(tls.target(bob))
    assert alice.call("GET", "/_ping").status == 200
    with pytest.raises(ssl.SSLError):
        stranger.call("GET", "/_ping")
    tls.authority.ca.write_bytes(other.ca.read_bytes())
    assert reload(tls).returncode == 0
    both = tls.client.ca  # the server's certificate is still from the first one
    with pytest.raises(ssl.SSLError):
        RawApi(TlsTarget(tls.port, both, tls.client)).call("GET", "/_ping")
    assert RawApi(TlsTarget(tls.port, both, bob)).call("GET", "/_ping").status == 200


@pytest.mark.parametrize("flaw", ["certificate is gone", "key is garbage", "key of another", "key for everybody"])
def test_a_reload_with_a_bad_certificate_fails(new_tls: NewTls, runc_container: TestContainer, flaw: str) -> None:
    """And nobody notices: not the clients, whose streams go on, nor who connects now."""
    tls = new_tls()
    api = RawApi(tls.target())
    before, worker = serial(tls), tls.service.pid
    certificate, key = tls.server.certificate.read_bytes(), tls.server.key.read_bytes()
    with api.open(runc_container.id, "cat", stdin=True) as session:
        assert session.echo(b"before\n") == b"before\n"
        match flaw:
            case "certificate is gone":
                tls.server.certificate.unlink()
            case "key is garbage":
                tls.server.key.write_bytes(b"garbage")
            case "key of another":
                tls.server.key.write_bytes(tls.client.key.read_bytes())
            case _:
                tls.server.key.chmod(0o644)
        failed = reload(tls)
        assert failed.returncode == 1
        assert "the reload failed" in failed.stderr
        assert "tls_" in tls.service.log()
        assert (tls.service.pid, serial(tls)) == (worker, before)
        assert session.echo(b"after\n") == b"after\n"
        tls.server.certificate.write_bytes(certificate)
        tls.server.key.write_bytes(key)
        tls.server.key.chmod(0o600)
        session.half_close()
        assert session.output() == (b"", b"")
    assert reload(tls).returncode == 0
    assert tls.service.pid != worker
    tls.service.assert_clean_log()


def test_a_crash_with_a_bad_certificate(new_tls: NewTls) -> None:
    """Somebody must serve: those at the unix socket at once, the others when the file is mended and reloaded."""
    tls = new_tls(standby="false")
    key = tls.server.key.read_bytes()
    tls.server.key.write_bytes(b"garbage")
    tls.service.crash()
    assert RawApi(tls.service.socket).call("GET", "/_ping").status == 200
    assert "TLS is not spoken" in tls.service.log()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(RawApi(tls.target()).call, "GET", "/_ping")
        tls.server.key.write_bytes(key)
        assert reload(tls).returncode == 0
        assert waiting.result().status == 200, "whoever came meanwhile has waited in the queue"
    tls.service.assert_clean_log()


def test_a_port_changes_to_tls_and_back(new_service: Callable[..., Service], new_tls: NewTls) -> None:
    """In a reload, without a moment in which nobody listens."""
    tls = new_tls()
    config = tls.service.directory / "execgate.toml"
    assert "listen" in config.read_text()
    port, directory = free_port(), tls.service.directory.with_name(f"{tls.service.directory.name}-changes")
    directory.mkdir()
    unix = f"unix://{directory}/execgate.sock"
    files = [f'{name.removeprefix("EXECGATE_").lower()} = "{value}"' for name, value in _settings(tls).items()]
    write_policy(directory, rule("all", EVERYBODY, **EVERYTHING))
    service = new_service(directory)
    good = (directory / "execgate.toml").read_text()
    target = TlsTarget(port, tls.authority.ca, tls.client)
    for scheme in ("tcp", "tls", "tcp", "tls"):
        listen = f'listen = ["{unix}", "{scheme}://127.0.0.1:{port}"]'
        lines = [line for line in good.splitlines() if not line.startswith("listen")]
        (directory / "execgate.toml").write_text("\n".join([*files, listen, *lines]) + "\n")
        service.reload()
        answer = RawApi(target if scheme == "tls" else ("127.0.0.1", port)).call("GET", "/_ping")
        assert answer.status == (200 if scheme == "tls" else 401), "plain TCP needs a token"
    service.assert_clean_log()


_ACTIVATE = """
import os, sys
os.dup2({fd}, 3) if {fd} != 3 else None
os.set_inheritable(3, True)
os.environ |= {{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "execgate.socket"}}
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_tcp_socket_of_systemd_speaks_tls(
    hosts: list[RuntimeHost], host_dir: Path, tls: TlsService, event_loop_name: str
) -> None:
    """Where a certificate is configured."""
    directory = host_dir / "activated-tls"
    write_policy(directory, rule("all", EVERYBODY, **EVERYTHING))
    notify = NotifySocket(directory / "notify")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = _ACTIVATE.format(fd=listener.fileno())
        config = write_config(directory, hosts, policy=(directory / POLICY).exists())
        argv = [sys.executable, "-c", code, str(execgate_program()), "serve", "--config", str(config)]
        env = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(notify.path), "EXECGATE_EVENT_LOOP": event_loop_name}
        with (directory / "service.log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdout=log, stderr=log, env=env | _settings(tls), pass_fds=[listener.fileno()]
            )
        try:
            notify.wait_for("READY=1", process, timeout=15)
            target = TlsTarget(listener.getsockname()[1], tls.authority.ca, tls.client)
            assert RawApi(target).call("GET", "/_ping").body == b"OK"
            process.send_signal(signal.SIGHUP)
            notify.wait_for("READY=1", process, timeout=15)
            assert RawApi(target).call("GET", "/_ping").body == b"OK"
        finally:
            process.terminate()
            process.wait()
            notify.close()


# -- who it is


def test_the_tunnel_is_nobody(new_tls: NewTls, runc_container: TestContainer) -> None:
    """Its inner end is a unix socket of the service's own user, and whoever comes through it is not that user."""
    tls = new_tls(tls_client_certificates="optional")
    mallory = tls.authority.client("mallory", "mallory@evil.example")
    assert RawApi(tls.service.socket).call("GET", "/containers/json").json != []
    assert RawApi(tls.target()).call("GET", "/containers/json").json != []
    assert RawApi(tls.target(mallory)).call("GET", "/containers/json").json == []
    refused = RawApi(tls.target(mallory)).call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]})
    assert refused.status == 404
    assert RawApi(tls.stranger()).call("GET", "/containers/json").status == 401
    assert RawApi(tls.stranger(), headers=tls.token()).call("GET", "/containers/json").json != []
    tls.service.reload()
    assert RawApi(tls.stranger()).call("GET", "/containers/json").status == 401
