"""Real TLS over socket pairs: both sides prove themselves, and each way to fail says what is wrong on both hosts."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from virtmig.agent import certificates
from virtmig.agent.certificates import (
    TlsFiles,
    client_context,
    find_tls_files,
    search_folders,
    server_context,
    tls_finding,
    tls_identity,
    tls_refusal,
)
from virtmig.agent.config import TlsSection
from virtmig.errors import ChannelError, RequestError

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)


class Authorities(NamedTuple):
    ours: trustme.CA
    other: trustme.CA


@pytest.fixture(scope="module")
def authorities() -> Authorities:
    return Authorities(trustme.CA(), trustme.CA())


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., TlsFiles]:
    """Writes a folder in QEMU's layout and says what is in it."""

    def write(
        authority: trustme.CA,
        server: trustme.LeafCert | None = None,
        client: trustme.LeafCert | None = None,
        name="pki",
    ) -> TlsFiles:
        place = tmp_path / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        authority.cert_pem.write_to_path(place / "ca-cert.pem")
        for role, leaf in (("server", server), ("client", client)):
            if leaf is not None:
                leaf.private_key_pem.write_to_path(place / f"{role}-key.pem")
                for part in leaf.cert_chain_pems:
                    part.write_to_path(place / f"{role}-cert.pem", append=True)
        return find_tls_files(TlsSection(folder=str(place)), "server" if server else "client")

    return write


class Ends(NamedTuple):
    """What each side has seen: the names of the peer, or its error in words."""

    server: ChannelError | tuple[str, ...]
    client: ChannelError | tuple[str, ...]


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext | None, files: TlsFiles, *, name: str = "host-a.example.org"
) -> Ends:
    """One TLS handshake over a socket pair, then a byte from the server; `client` None: a peer that speaks no TLS."""
    here, there = socket.socketpair()
    seen: list[ChannelError | tuple[str, ...]] = []

    def serve() -> None:
        try:
            with server.wrap_socket(here, server_side=True) as connection:
                seen.append(tls_identity(connection).names)
                connection.sendall(b"x")
        except (OSError, ChannelError) as error:
            seen.append(tls_refusal(error, peer="10.0.0.2", files=files) if isinstance(error, OSError) else error)
        finally:
            here.close()

    for end in (here, there):
        end.settimeout(20)
    thread = threading.Thread(target=serve)
    thread.start()
    result: ChannelError | tuple[str, ...]
    try:
        with there:
            if client is None:
                there.sendall(b"QEVM\0\0\0\3" + bytes(64))
                there.shutdown(socket.SHUT_WR)
                result = ()
            else:
                with client.wrap_socket(there, server_hostname=name) as connection:
                    result = tls_identity(connection).names
                    assert connection.version() in ("TLSv1.2", "TLSv1.3")
                    if not connection.recv(1):  # TLS 1.3 tells a client only now that its certificate was refused
                        raise ConnectionResetError
    except OSError as error:
        result = tls_refusal(error, peer=f"{name} (10.0.0.1)", files=files)
    finally:
        thread.join()
    return Ends(seen[0], result)


def text(end: ChannelError | tuple[str, ...]) -> str:
    return f"{end} / {end.hint}" if isinstance(end, ChannelError) else f"no error, {end}"


# -- it works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_sides_learn_who_the_other_is(authorities, folder, newest: ssl.TLSVersion) -> None:
    here = folder(
        authorities.ours,
        authorities.ours.issue_cert("host-a.example.org", "10.0.0.1"),
        authorities.ours.issue_cert("host-b.example.org", "alias.example.org", "10.0.0.2"),
    )
    server, client = server_context(here), client_context(here)
    client.maximum_version = newest
    ends = shake_hands(server, client, here)
    assert ends.client == ("host-a.example.org", "10.0.0.1")
    assert ends.server == ("host-b.example.org", "alias.example.org", "10.0.0.2")
    assert shake_hands(server, client, here, name="10.0.0.1").client == ends.client  # dialled by its address


def test_one_pair_serves_both_directions(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    ends = shake_hands(server_context(files), client_context(files), files)
    assert ends == Ends(("host-a.example.org",), ("host-a.example.org",))


def test_the_common_name_counts_when_there_is_no_other(authorities, folder) -> None:
    client = authorities.ours.issue_cert(common_name="host-c")
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"), client)
    assert shake_hands(server_context(files), client_context(files), files).server == ("host-c",)


def test_tickets_are_not_sent(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    assert server_context(files).num_tickets == 0


# -- it fails ------------------------------------------------------------------------------------------------------


def test_a_server_of_another_ca(authorities, folder) -> None:
    theirs = folder(authorities.other, authorities.other.issue_cert("host-a.example.org"), name="theirs")
    ours = folder(authorities.ours, authorities.ours.issue_cert("host-b.example.org"))
    ends = shake_hands(server_context(theirs), client_context(ours), ours)
    assert "host-a.example.org (10.0.0.1) is refused: it is not signed by our CA" in text(ends.client)
    assert ours.ca in text(ends.client)
    assert "10.0.0.2 refuses our certificate or TLS: ours is not signed by its CA" in text(ends.server)


def test_a_client_of_another_ca(authorities, folder) -> None:
    ours = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    theirs = folder(authorities.other, authorities.other.issue_cert("host-b.example.org"), name="theirs")
    shutil.copy(ours.ca, theirs.ca)  # it believes us, we do not believe it
    ends = shake_hands(server_context(ours), client_context(theirs), theirs)
    assert "the certificate of 10.0.0.2 is refused: it is not signed by our CA" in text(ends.server)
    assert "refuses our certificate or TLS: ours is not signed by its CA" in text(ends.client)


@pytest.mark.parametrize(
    ("begins", "ends_", "words", "told"),
    [
        (-3 * DAY, -DAY, "it has expired", "ours has expired"),
        (DAY, 3 * DAY, "it is not valid yet", "ours does not fit"),
    ],
)
def test_certificates_out_of_their_time(authorities, folder, begins, ends_, words: str, told: str) -> None:
    bad = authorities.ours.issue_cert("host-a.example.org", not_before=NOW + begins, not_after=NOW + ends_)
    good = authorities.ours.issue_cert("host-a.example.org")
    files = folder(authorities.ours, bad, good)
    ends = shake_hands(server_context(files), client_context(files), files)
    assert f"is refused: {words}" in text(ends.client)
    assert "clocks" in text(ends.client)
    assert told in text(ends.server)
    files = folder(authorities.ours, good, bad)
    ends = shake_hands(server_context(files), client_context(files), files)
    assert f"the certificate of 10.0.0.2 is refused: {words}" in text(ends.server)
    assert told in text(ends.client)


@pytest.mark.parametrize(
    ("name", "words"), [("host-b.example.org", "for another name"), ("10.9.9.9", "for another address")]
)
def test_a_server_with_another_name(authorities, folder, name: str, words: str) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org", "10.0.0.1"))
    ends = shake_hands(server_context(files), client_context(files), files, name=name)
    assert words in text(ends.client)
    assert name in text(ends.client)
    assert "subjectAltName" in text(ends.client)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate(authorities, folder, newest: ssl.TLSVersion) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    bare = ssl.create_default_context(cafile=files.ca)
    bare.maximum_version = newest
    ends = shake_hands(server_context(files), bare, files)
    assert "10.0.0.2 has shown no certificate" in text(ends.server)
    told = "we have shown none" if newest is ssl.TLSVersion.TLSv1_3 else "no cipher or signature in common"
    assert told in text(ends.client)


def test_a_peer_that_speaks_no_tls(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    ends = shake_hands(server_context(files), None, files)
    assert "10.0.0.2 does not speak TLS (wrong version number)" in text(ends.server)


def test_a_peer_that_speaks_only_old_tls(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("host-a.example.org"))
    old = client_context(files)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    ends = shake_hands(server_context(files), old, files)
    assert "10.0.0.2 speaks no TLS 1.2 or newer" in text(ends.server)
    assert "it speaks no TLS" in text(ends.client) or "protocol version" in text(ends.client)


def test_a_peer_that_hangs_up_or_is_slow() -> None:
    files = TlsFiles(folder="/pki")
    assert "has hung up during the TLS handshake" in text(tls_refusal(ConnectionResetError(), peer="p", files=files))
    assert "has not finished the TLS handshake in time" in text(tls_refusal(TimeoutError(), peer="p", files=files))


def test_a_certificate_without_a_name(authorities) -> None:
    class Nameless:
        def getpeercert(self) -> dict[str, object]:
            return {"subject": ((("organizationName", "host-b"),),), "subjectAltName": (("email", "a@b"),)}

    with pytest.raises(ChannelError, match="has no name"):
        tls_identity(Nameless())  # type: ignore[arg-type]


def test_a_revoked_certificate(authorities, folder) -> None:
    revoked, good = (authorities.ours.issue_cert("host-a.example.org") for _ in range(2))
    files = folder(authorities.ours, good, revoked)
    write_crl(authorities.ours, revoked, Path(files.folder) / "ca-crl.pem")
    files = find_tls_files(TlsSection(folder=files.folder), "server")
    ends = shake_hands(server_context(files), client_context(files), files)
    assert "the certificate of 10.0.0.2 is refused: it was revoked by its CA" in text(ends.server)
    assert "ours was revoked" in text(ends.client)
    write_crl(authorities.ours, authorities.ours.issue_cert("x"), Path(files.folder) / "ca-crl.pem")
    assert shake_hands(server_context(files), client_context(files), files).server == ("host-a.example.org",)
    write_crl(authorities.other, revoked, Path(files.folder) / "ca-crl.pem")
    ends = shake_hands(server_context(files), client_context(files), files)
    assert "no revocation list of its CA is here" in text(ends.client)


def write_crl(authority: trustme.CA, revoked: trustme.LeafCert, path: Path) -> None:
    number = x509.load_pem_x509_certificate(revoked.cert_chain_pems[0].bytes()).serial_number
    entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(NOW - DAY).build()
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes()).subject
    key = load_pem_private_key(authority.private_key_pem.bytes(), None)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer).add_revoked_certificate(entry)
    made = builder.last_update(NOW - DAY).next_update(NOW + DAY).sign(key, hashes.SHA256())  # type: ignore[arg-type]
    path.write_bytes(made.public_bytes(Encoding.PEM))


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_key_of_another_certificate(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("a"))
    authorities.ours.issue_cert("a").private_key_pem.write_to_path(files.server_key)
    with pytest.raises(RequestError, match=r"server-key.pem is not the key of .*server-cert.pem"):
        server_context(files)


def test_files_that_are_not_what_they_should_be(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("a"))
    key = Path(files.server_key)
    loaded = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"p")))
    with pytest.raises(RequestError, match=r"server-key.pem: the key is encrypted"):
        server_context(files)
    key.write_text("nonsense")
    with pytest.raises(RequestError, match="not a certificate and its key in PEM"):
        server_context(files)
    Path(files.ca).write_text("nonsense")
    with pytest.raises(RequestError, match=r"ca-cert.pem: nothing in PEM that can be trusted"):
        client_context(files)
    key.unlink()
    with pytest.raises(RequestError, match=r"server-key.pem: No such file"):
        server_context(files)
    key.symlink_to("/nowhere/key.pem")
    with pytest.raises(RequestError, match=r"server-key.pem: No such file") as refused:
        server_context(find_tls_files(TlsSection(folder=files.folder), "server"))
    assert f"uid {os.geteuid()}" in refused.value.hint


def test_the_search_order_and_both_layouts(tmp_path: Path) -> None:
    qemu, libvirt, flat = (tmp_path / name for name in ("pki/qemu", "pki/libvirt", "user"))

    def put(*paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")

    order = (tmp_path / "none", qemu, libvirt, flat)
    with pytest.raises(RequestError) as refused:
        find_tls_files(TlsSection(), "server", folders=order)
    for place in order:
        assert f"{place}: no CA, server certificate, server key" in str(refused.value)
    put(flat / "cacert.pem", flat / "servercert.pem", flat / "serverkey.pem", flat / "cacrl.pem")
    found = find_tls_files(TlsSection(), "server", folders=order)
    assert (found.folder, found.crl) == (str(flat), str(flat / "cacrl.pem"))
    put(tmp_path / "pki/CA/cacert.pem", libvirt / "servercert.pem", libvirt / "private/serverkey.pem")
    found = find_tls_files(TlsSection(), "server", folders=order)
    assert (found.ca, found.server_key) == (str(tmp_path / "pki/CA/cacert.pem"), str(libvirt / "private/serverkey.pem"))
    put(qemu / "ca-cert.pem", qemu / "client-cert.pem", qemu / "client-key.pem")
    assert find_tls_files(TlsSection(), "server", folders=order).folder == str(libvirt)  # qemu has no server's pair
    found = find_tls_files(TlsSection(), "client", folders=order)
    assert found.pair("client") == (str(qemu / "client-cert.pem"), str(qemu / "client-key.pem"))
    with pytest.raises(RequestError, match="no server certificate, server key"):
        find_tls_files(TlsSection(folder=str(qemu)), "server")
    named = TlsSection(ca_file="/a", server_certificate_file="/b", server_key_file="/c")
    assert find_tls_files(named, "server", folders=order).pair("client") == ("/b", "/c")
    with pytest.raises(RequestError, match="server key missing"):
        find_tls_files(TlsSection(ca_file="/a", server_certificate_file="/b"), "server", folders=order)


def test_where_certificates_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conf = tmp_path / "qemu.conf"
    monkeypatch.setattr(certificates, "_QEMU_CONF", str(conf))
    system = ["/etc/virtmig/pki", "/etc/pki/libvirt-migrate", "/etc/pki/qemu", "/etc/pki/libvirt"]
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert [str(path) for path in search_folders()] == system
    conf.write_text('#default_tls_x509_cert_dir = "/no"\nmigrate_tls_x509_cert_dir = "/etc/pki/moves"\n')
    assert [str(path) for path in search_folders()][1:3] == ["/etc/pki/moves", "/etc/pki/qemu"]
    assert search_folders(TlsSection(folder="/mine")) == (Path("/mine"),)
    conf.unlink()
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    for name in ("RUNTIME_DIRECTORY", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert [str(path) for path in search_folders()] == ["/h/.config/virtmig/pki", "/h/.pki/libvirt", *system]


def test_the_finding_says_whether_they_load(authorities, folder) -> None:
    files = folder(authorities.ours, authorities.ours.issue_cert("a"))
    found = tls_finding(TlsSection(folder=files.folder))
    assert (found.status, found.evidence) == ("yes", f"the agent uses {files.folder}")
    Path(files.server_key).unlink()
    found = tls_finding(TlsSection(folder=files.folder))
    assert found.status == "no"
    assert "no server key" in found.evidence
