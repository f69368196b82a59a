"""The files of TLS: what is wrong with one is said before anything depends on it, and said so that it can be mended."""

import ssl
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate.config import Config
from execgate.http.certificates import TlsFiles, TlsSettings, client_context, server_context
from execgate.model.errors import InvalidArgument
from support.tls import Authority, Identity


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "pki")


@pytest.fixture
def server(authority: Authority, tmp_path: Path) -> Identity:
    return authority.server(tmp_path.name, "localhost", "127.0.0.1")


@pytest.fixture
def settings(authority: Authority, server: Identity) -> TlsSettings:
    return TlsSettings(
        certificate=server.certificate,
        key=server.key,
        client_ca=authority.ca,
        client_required=True,
        minimum=ssl.TLSVersion.TLSv1_3,
    )


def test_what_is_configured(settings: TlsSettings) -> None:
    context = server_context(settings)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.num_tickets == 0
    assert server_context(replace(settings, client_required=False)).verify_mode is ssl.CERT_OPTIONAL
    assert server_context(replace(settings, client_required=False, client_ca=None)).verify_mode is ssl.CERT_NONE
    assert server_context(replace(settings, minimum=ssl.TLSVersion.TLSv1_2)).minimum_version is ssl.TLSVersion.TLSv1_2


def _gone(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("break_it", [_gone, _directory, _empty, _garbage])
@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_a_file_that_cannot_be_used(
    settings: TlsSettings, tmp_path: Path, name: str, break_it: Callable[[Path], None]
) -> None:
    path = tmp_path / "it.pem"
    path.write_bytes(getattr(settings, name).read_bytes())
    path.chmod(0o600)
    changed: dict[str, Any] = {name: path}
    broken = replace(settings, **changed)
    server_context(broken)
    break_it(path)
    with pytest.raises(InvalidArgument) as error:
        server_context(broken)
    assert f"tls_{name}" in error.value.message
    assert str(path) in error.value.message


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
def test_a_key_that_everybody_has(settings: TlsSettings, mode: int) -> None:
    settings.key.chmod(mode)
    with pytest.raises(InvalidArgument, match="everybody") as error:
        server_context(settings)
    assert error.value.hint == f"chmod 600 {settings.key}"
    settings.key.chmod(0o640)
    server_context(settings)


def test_a_key_of_another_certificate(settings: TlsSettings, authority: Authority, tmp_path: Path) -> None:
    other = authority.server(f"other-{tmp_path.name}", "localhost")
    with pytest.raises(InvalidArgument, match=f"{other.key} does not belong to the certificate {settings.certificate}"):
        server_context(replace(settings, key=other.key))


def test_an_encrypted_key_asks_nobody(settings: TlsSettings, tmp_path: Path) -> None:
    path = tmp_path / "encrypted.pem"
    encrypt = ["openssl", "pkey", "-in", settings.key, "-aes256", "-passout", "pass:secret", "-out", path]
    subprocess.run([str(word) for word in encrypt], check=True)
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match=f"tls_key: {path} is encrypted"):
        server_context(replace(settings, key=path))


def test_nobody_could_connect(settings: TlsSettings) -> None:
    with pytest.raises(InvalidArgument, match="tls_client_ca is not set"):
        server_context(replace(settings, client_ca=None))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"listen": ["tls://0.0.0.0:2376"]}, "tls:// needs tls_certificate and tls_key"),
        ({"tls_certificate": "/x"}, "need each other"),
        ({"tls_key": "/x"}, "need each other"),
        ({"tls_minimum": "1.1"}, "tls_minimum"),
        ({"tls_client_certificates": "none"}, "tls_client_certificates"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate(fields)


def test_a_clients_files(authority: Authority, tmp_path: Path) -> None:
    alice = authority.client(f"alice-{tmp_path.name}", "alice@example.org")
    files = TlsFiles.in_directory(alice.directory)
    assert files == TlsFiles(ca=alice.ca, certificate=alice.certificate, key=alice.key)
    client_context(files)
    assert TlsFiles.in_directory(tmp_path / "nowhere") == TlsFiles()
    assert client_context(TlsFiles()).verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(InvalidArgument, match="need each other"):
        client_context(replace(files, key=None))
    with pytest.raises(InvalidArgument, match="nowhere"):
        client_context(replace(files, ca=tmp_path / "nowhere"))
    with pytest.raises(InvalidArgument, match="no certificate and its key"):
        client_context(replace(files, certificate=alice.key))


def test_what_docker_has_long_recommended_is_taken(tmp_path: Path, settings: TlsSettings) -> None:
    """An authority without the extensions that a strict check wants, on every Python."""
    run = ["openssl", "req", "-new", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=docker", "-days", "2"]
    key, ca = tmp_path / "ca-key.pem", tmp_path / "ca.pem"
    subprocess.run([*run, "-keyout", str(key), "-out", str(ca)], check=True, capture_output=True)
    context = server_context(replace(settings, client_ca=ca))
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
