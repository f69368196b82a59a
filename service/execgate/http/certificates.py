"""What TLS is spoken with: files, read once, and checked before anything depends on them."""

import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from execgate.model.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """What is configured. Without `client_ca` no certificate is asked of clients; files are PEM."""

    certificate: Path
    key: Path
    client_ca: Path | None
    client_required: bool
    minimum: ssl.TLSVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What a client speaks TLS with, in PEM: whom it trusts (None: whom this host does), and who it is, if anybody."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def in_directory(cls, directory: Path | str) -> "TlsFiles":
        """Return those that are in a directory under the names that Docker's clients know."""
        ca, certificate, key = (
            path if path.exists() else None
            for path in (Path(directory, f"{name}.pem") for name in ("ca", "cert", "key"))
        )
        return cls(ca=ca, certificate=certificate, key=key)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Read a client's files. InvalidArgument says which one cannot be used, and why."""
    if (files.certificate is None) != (files.key is None):
        raise InvalidArgument("a client's certificate and its key need each other")
    if files.ca is not None:
        _check_readable("the authority", files.ca)
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except ssl.SSLError as error:
        raise InvalidArgument(f"{files.ca} has no certificate: {reason(error)}") from error
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as the service's
    if files.certificate is not None and files.key is not None:
        _load_certificate(context, files.certificate, files.key, names=("the certificate", "the key"))
    return context


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """Read the files. InvalidArgument says which one cannot be used, and why."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = settings.minimum
    # No compression is the default. No tickets: a resumed session would outlive the client's certificate.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    # From Python 3.13 on strict by default, where a certification authority made as Docker's guide says is refused.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings.certificate, settings.key, names=("tls_certificate", "tls_key"))
    if settings.key.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise InvalidArgument(
            f"tls_key: {settings.key} can be read or written by everybody", hint=f"chmod 600 {settings.key}"
        )
    if settings.client_ca is not None:
        _load_client_ca(context, settings.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED if settings.client_required else ssl.CERT_OPTIONAL
    elif settings.client_required:
        raise InvalidArgument(
            "tls_client_ca is not set: nobody could connect",
            hint='without client certificates, set tls_client_certificates = "optional"',
        )
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path, *, names: tuple[str, str]) -> None:
    """Load both; `names` is how a complaint calls them."""
    _check_readable(names[0], certificate)
    _check_readable(names[1], key)

    def no_password() -> bytes:  # or OpenSSL would ask the terminal
        raise InvalidArgument(f"{names[1]}: {key} is encrypted", hint="`openssl pkey` removes the password")

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidArgument(f"{names[1]}: {key} does not belong to the certificate {certificate}") from error
        # OpenSSL does not tell which of them it means.
        text = f"{certificate} and {key} are no certificate and its key, in PEM: {reason(error)}"
        raise InvalidArgument(f"{names[0]}, {names[1]}: {text}") from error


def _load_client_ca(context: ssl.SSLContext, path: Path) -> None:
    _check_readable("tls_client_ca", path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise InvalidArgument(f"tls_client_ca: {path} has no certificate: {reason(error)}") from error


def _check_readable(name: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InvalidArgument(f"{name}: {path}: {error.strerror}") from error


def reason(error: BaseException) -> str:
    """Return what went wrong in TLS, in OpenSSL's words: ours say where."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error)
