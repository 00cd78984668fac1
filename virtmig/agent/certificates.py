"""Certificates: which are taken, TLS with them both ways, whose they are, and what went wrong in words.

Always mutual and at least TLS 1.2. Folders are read in QEMU's layout (docs/system/tls.rst: ca-cert.pem,
server-cert.pem, ...) and in libvirt's (rpc/virnettlsconfig.c: cacert.pem, servercert.pem, private/serverkey.pem, ...).
A host with one certificate for both directions needs only the server's.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from virtmig.agent.access import Identity
from virtmig.agent.config import TlsSection
from virtmig.engine.agents import runs_as_system
from virtmig.errors import ChannelError, RequestError
from virtmig.facts import Finding
from virtmig.virt.local_daemon import conf_value, read_text

Role = Literal["server", "client"]

_QEMU_CONF = "/etc/libvirt/qemu.conf"


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files; empty: there is none. `folder` is where they were found, empty when each was named."""

    folder: str = ""
    ca: str = ""
    crl: str = ""
    server_certificate: str = ""
    server_key: str = ""
    client_certificate: str = ""
    client_key: str = ""

    def pair(self, role: Role) -> tuple[str, str]:
        """(certificate, key) that this host shows in that role; the server's also when it dials and has no other."""
        if role == "client" and self.client_certificate:
            return self.client_certificate, self.client_key
        return self.server_certificate, self.server_key

    def complete(self, role: Role) -> bool:
        return bool(self.ca and all(self.pair(role)))

    def __str__(self) -> str:
        return self.folder or self.ca or "no certificates"


class _Layout(NamedTuple):
    """File names below a folder; a name that is absolute stands outside it."""

    ca: str
    crl: str
    server_certificate: str
    server_key: str
    client_certificate: str
    client_key: str


_LAYOUTS = (
    _Layout("ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"),
    _Layout("cacert.pem", "cacrl.pem", "servercert.pem", "serverkey.pem", "clientcert.pem", "clientkey.pem"),
    # libvirt's folder of the system: its CA stands in one of its own
    _Layout("../CA/cacert.pem", "../CA/cacrl.pem", "servercert.pem", "private/serverkey.pem", "clientcert.pem",
            "private/clientkey.pem"),
)  # fmt: skip


def search_folders(section: TlsSection | None = None) -> tuple[Path, ...]:
    """Where certificates are looked for, in this order: virtmig's own, those of libvirt's migrations, QEMU, libvirt.

    `tls.folder` is the only one when it is set. The folders that qemu.conf names stand in for libvirt's usual ones.
    """
    if section is not None and section.folder:
        return (Path(section.folder),)
    own: list[Path] = []
    if not runs_as_system():
        config = os.environ.get("XDG_CONFIG_HOME")
        own = [(Path(config) if config else Path.home() / ".config") / "virtmig/pki", Path.home() / ".pki/libvirt"]
    conf = read_text(_QEMU_CONF) or ""
    named = (conf_value(conf, f"{use}_tls_x509_cert_dir") for use in ("migrate", "default"))
    migrate, default = (Path(name) if name else None for name in named)
    return (
        *own,
        Path("/etc/virtmig/pki"),
        migrate or Path("/etc/pki/libvirt-migrate"),
        default or Path("/etc/pki/qemu"),
        Path("/etc/pki/libvirt"),
    )


def find_tls_files(section: TlsSection, role: Role, *, folders: Iterable[Path] | None = None) -> TlsFiles:
    """The files named in `section`, else those of the first folder with a CA and a pair for `role`.

    Raises RequestError, with what each folder lacks.
    """
    named = TlsFiles(
        ca=section.ca_file,
        crl=section.crl_file,
        server_certificate=section.server_certificate_file,
        server_key=section.server_key_file,
        client_certificate=section.client_certificate_file,
        client_key=section.client_key_file,
    )
    if named != TlsFiles():
        if named.complete(role):
            return named
        raise RequestError(
            f"tls: of the files for the {role} only some are named: {_lacks(named, role)} missing",
            option="tls",
            hint=f"name tls.ca_file, tls.{role}_certificate_file and tls.{role}_key_file, or none of them",
        )
    looked = []
    for folder in search_folders(section) if folders is None else folders:
        found = max((_look(folder, layout) for layout in _LAYOUTS), key=lambda files: _count(files, role))
        if found.complete(role):
            return found
        looked.append(f"{folder}: no {_lacks(found, role)}")
    raise RequestError(
        f"no certificates for the {role}: {'; '.join(looked)}",
        option="tls",
        hint="put ca-cert.pem, server-cert.pem and server-key.pem into /etc/virtmig/pki, readable for the agent's user",
    )


def _look(folder: Path, layout: _Layout) -> TlsFiles:
    # lexists: a key that this user may not read is found here, and its error comes when it is loaded
    paths = {field: os.path.normpath(folder / name) for field, name in layout._asdict().items()}
    return TlsFiles(folder=str(folder), **{field: path for field, path in paths.items() if os.path.lexists(path)})


def _count(files: TlsFiles, role: Role) -> int:
    return sum(map(bool, (files.ca, *files.pair(role))))


def _lacks(files: TlsFiles, role: Role) -> str:
    certificate, key = files.pair(role)
    parts = {"CA": files.ca, f"{role} certificate": certificate, f"{role} key": key}
    return ", ".join(name for name, path in parts.items() if not path)


def tls_finding(section: TlsSection) -> Finding:
    """Whether the agent has certificates that load for both directions: for the handshake's facts."""
    try:
        files = find_tls_files(section, "server")
        server_context(files)
        client_context(files)
    except RequestError as error:
        return Finding("no", error.message)
    return Finding("yes", f"the agent uses {files}")


# -- contexts ------------------------------------------------------------------------------------------------------


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For accepting: a peer without a certificate of our CA is refused. Raises RequestError that names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # tickets are bytes of the server that nobody asked for, at a time of its choice; we resume channels ourselves
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    return _load(context, files, "server")


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For dialling: wrap_socket wants `server_hostname`, the name or address that must stand in the certificate.

    Raises RequestError that names the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    context.options |= ssl.OP_NO_RENEGOTIATION
    return _load(context, files, "client")


def _load(context: ssl.SSLContext, files: TlsFiles, role: Role) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate, key = files.pair(role)
    for path in (files.ca, certificate, key, files.crl):
        _check_readable(path)
    _load_authority(context, files.ca)
    if files.crl:
        _load_authority(context, files.crl)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except _PasswordAskedError:
        raise RequestError(
            f"{key}: the key is encrypted, and nobody is there to type its password",
            option="tls",
            hint=f"store it without one, readable for the agent only: openssl pkey -in {key}",
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            words, hint = f"{key} is not the key of {certificate}", "they were made in different runs: make both anew"
        else:
            words, hint = f"{certificate} and {key}: not a certificate and its key in PEM ({error.reason})", ""
        raise RequestError(words, option="tls", hint=hint) from error
    except OSError as error:  # it was there a moment ago
        raise RequestError(f"{certificate}, {key}: {error.strerror}", option="tls") from error
    return context


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise RequestError(f"{path}: nothing in PEM that can be trusted ({error.reason})", option="tls") from error
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", option="tls") from error


def _check_readable(path: str) -> None:
    """OpenSSL names no file in its errors."""
    if not path:
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise RequestError(
            f"{path}: {error.strerror}",
            option="tls",
            hint=f"uid {os.geteuid()} must be able to read it; or LoadCredential= in the unit",
        ) from error


class _PasswordAskedError(Exception):
    pass


def _refuse_password() -> str:
    raise _PasswordAskedError


# -- the peer ------------------------------------------------------------------------------------------------------


def tls_identity(connection: ssl.SSLSocket | ssl.SSLObject) -> Identity:
    """Whose certificate the peer has shown: SAN host names, SAN addresses, else the CN. After the TLS handshake.

    Raises ChannelError for a certificate without any name.
    """
    certificate = connection.getpeercert() or {}
    alternatives: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    names = [value for wanted in ("DNS", "IP Address") for kind, value in alternatives if kind == wanted]
    if not names:
        subject: Iterable[Iterable[tuple[str, str]]] = certificate.get("subject", ())  # type: ignore[assignment]
        names = [value for part in subject for key, value in part if key == "commonName"]
    if not names:
        raise ChannelError(
            "the peer's certificate has no name", hint="it needs a subjectAltName with the host's name, or a CN"
        )
    return Identity(kind="tls", names=tuple(names))


class _Words(NamedTuple):
    what: str
    hint: str


#: X509_V_ERR_* of OpenSSL's x509_vfy.h: why we refuse the peer's certificate
_VERIFY: dict[int, _Words] = {
    3: _Words("no revocation list of its CA is here", "put the CA's list into the CRL file, or remove that file"),
    7: _Words("its signature is wrong", "it was not made by the CA whose name it bears"),
    9: _Words("it is not valid yet", "compare the clocks of both hosts"),
    10: _Words("it has expired", "make a new certificate for that host; compare the clocks of both hosts"),
    12: _Words("the revocation list has expired", "get a new list from the CA"),
    23: _Words("it was revoked by its CA", "make a new certificate for that host"),
    26: _Words("it is not meant for this direction", "its extended key usage must hold clientAuth and serverAuth"),
    62: _Words("it is for another name", "dial the name that stands in it, or add this one as subjectAltName"),
    64: _Words("it is for another address", "dial a name that stands in it, or add the address as subjectAltName"),
    79: _Words("its CA is no CA", "the CA's certificate needs basicConstraints CA:TRUE"),
} | dict.fromkeys(
    (2, 18, 19, 20, 21),
    _Words("it is not signed by our CA", "both hosts need certificates of one CA, and that CA's certificate"),
)

#: TLS alerts (RFC 8446, 6): why the peer refuses ours
_ALERTS: dict[str, _Words] = {
    "UNKNOWN_CA": _Words("ours is not signed by its CA", "both hosts need certificates of one CA, and its certificate"),
    "CERTIFICATE_EXPIRED": _Words("ours has expired", "make a new certificate; compare the clocks of both hosts"),
    "CERTIFICATE_REVOKED": _Words("ours was revoked", "make a new certificate for this host"),
    "CERTIFICATE_REQUIRED": _Words("we have shown none", "this host needs a client certificate"),
    "BAD_CERTIFICATE": _Words("ours does not fit", "the other host's log says what is wrong with it"),
    "UNSUPPORTED_CERTIFICATE": _Words(
        "ours is not meant for this direction", "its extended key usage must hold clientAuth and serverAuth"
    ),
    "CERTIFICATE_UNKNOWN": _Words("ours does not fit", "the other host's log says what is wrong with it"),
    "PROTOCOL_VERSION": _Words("it speaks no TLS 1.2 or newer", "bring its software up to date"),
    "HANDSHAKE_FAILURE": _Words("both have no cipher or signature in common", "compare the crypto policies of both"),
}

#: other reasons of OpenSSL's ssl.h
_REASONS: dict[str, _Words] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": _Words(
        "has shown no certificate", "it needs a client certificate of our CA; TLS is mutual here"
    ),
    "NO_SHARED_CIPHER": _Words("has no cipher in common with us", "compare the crypto policies of both"),
    "UNSUPPORTED_PROTOCOL": _Words("speaks no TLS 1.2 or newer", "bring its software up to date"),
    "UNEXPECTED_EOF_WHILE_READING": _Words("has hung up", "its log says why"),
}
_NOT_TLS = _Words("does not speak TLS", "is that port an agent's, and its security the same as here?")


def tls_refusal(error: BaseException, *, peer: str, files: TlsFiles) -> ChannelError:
    """What a failed TLS handshake means, or a failed first read after one (TLS 1.3 tells the client that late).

    `peer` is for people: the address and, when dialling, the name asked for.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _VERIFY.get(error.verify_code, _Words(error.verify_message, ""))
        return ChannelError(f"the certificate of {peer} is refused: {words.what} (our CA: {files.ca})", hint=words.hint)
    reason = (getattr(error, "reason", None) or "") if isinstance(error, ssl.SSLError) else ""
    if alert := re.search(r"ALERT_(\w+)$", reason):
        words = _ALERTS.get(alert[1], _Words(alert[1].lower().replace("_", " "), ""))
        return ChannelError(f"{peer} refuses our certificate or TLS: {words.what} (we use {files})", hint=words.hint)
    if reason in _REASONS:
        words = _REASONS[reason]
    elif isinstance(error, ssl.SSLError) and reason:
        words = _NOT_TLS
    elif isinstance(error, TimeoutError):
        words = _Words("has not finished the TLS handshake in time", "is that port an agent's?")
    else:
        words = _Words("has hung up during the TLS handshake", "its log says why")
    detail = reason.lower().replace("_", " ") or str(error)
    return ChannelError(f"{peer} {words.what}{f' ({detail})' if detail else ''}", hint=words.hint)
