"""Where the API listens: a socket for its group, mutual TLS and the right to manage, plain on loopback only."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.integrations.api.serving import served
from virtmig.agent.config import Address, AgentConfig, AllowRow, LocalSection, TlsSection
from virtmig.errors import ChannelError, RequestError
from virtmig.integrations.api import app, serving
from virtmig.integrations.api.app import Api
from virtmig.integrations.api.jobs import Jobs
from virtmig.integrations.api.serving import DEFAULT_PORT, Listening, parse_address

LOOPBACK = Address("tcp", host="127.0.0.1")


@pytest.fixture
def short() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vma-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(Jobs(tmp_path / "records"))


def test_addresses() -> None:
    assert parse_address("tcp:host-a").port == parse_address("tcp:[::1]").port == DEFAULT_PORT
    assert parse_address("tcp:[::1]:80").port == 80
    assert parse_address("tcp:host-a:0").port == 0
    assert parse_address("unix:/run/x").path == "/run/x"
    for wrong in ("", "host", "unix:x", "tcp:", "udp:h:1"):
        with pytest.raises(RequestError):
            parse_address(wrong)


def test_the_socket_is_its_groups_alone_and_goes_with_the_api(api: Api, short: Path) -> None:
    path = short / "d" / "api.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # of an API that was killed
    with served(api, Address("unix", path=str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(ChannelError, match="another one listens"):
            Listening(api.application(), Address("unix", path=str(path)), AgentConfig())
        assert [each.name for each in path.parent.iterdir()] == ["api.sock"]
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(ChannelError, match="no socket"):
        Listening(api.application(), Address("unix", path=str(path)), AgentConfig())
    assert path.read_text() == "mine"
    config = AgentConfig(local=LocalSection(group="no-such-group"))
    with pytest.raises(RequestError, match="no-such-group"):
        Listening(api.application(), Address("unix", path=f"{path}2"), config)
    assert [each.name for each in path.parent.iterdir()] == ["api.sock"]


def test_plain_text_is_for_loopback_and_its_names(api: Api) -> None:
    with pytest.raises(RequestError, match="loopback"):
        Listening(api.application(), Address("tcp", host="0.0.0.0"), AgentConfig(), plain=True)
    with pytest.raises(RequestError, match="loopback"):
        Listening(api.application(), Address("tcp", host="host-a.example.org"), AgentConfig(), plain=True)
    with served(api, LOOPBACK, plain=True) as address:
        url = f"http://127.0.0.1:{address.port}/v1/migrations"
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"host": f"localhost:{address.port}"}).status_code == 200
        bent = httpx.get(url, headers={"host": f"evil.example:{address.port}"})
        assert (bent.status_code, bent.json()["title"]) == (403, "The peer may not do this")


def test_without_certificates_tcp_is_refused(api: Api, short: Path) -> None:
    with pytest.raises(RequestError, match="no certificates"):
        Listening(api.application(), LOOPBACK, AgentConfig(tls=TlsSection(folder=str(short))))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def client_context(authority: trustme.CA, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if name:
        authority.issue_cert(name).configure_cert(context)
    return context


def test_a_handshake_that_does_not_come_is_not_waited_for(
    api: Api, short: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_S", 0.3)
    with (
        served(api, LOOPBACK, with_certificates(short, authority)) as address,
        socket.create_connection(("127.0.0.1", address.port), timeout=10) as silent,
        contextlib.suppress(ConnectionResetError),
    ):
        assert silent.recv(1) == b""


def with_certificates(folder: Path, authority: trustme.CA) -> AgentConfig:
    own = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    own.cert_chain_pems[0].write_to_path(folder / "server-cert.pem")
    own.private_key_pem.write_to_path(folder / "server-key.pem")
    return AgentConfig(
        tls=TlsSection(folder=str(folder)),
        allow=(AllowRow(peer="tls:boss.example.org", rights=("manage",)),
               AllowRow(peer="tls:host-*.example.org", rights=("send", "receive"))),
    )  # fmt: skip


def test_tcp_is_mutual_tls_and_takes_the_right_to_manage(api: Api, short: Path, authority: trustme.CA) -> None:
    config = with_certificates(short, authority)
    with served(api, LOOPBACK, config) as address:
        url = f"https://127.0.0.1:{address.port}/v1/migrations"
        with httpx.Client(verify=client_context(authority, "boss.example.org")) as boss:
            assert boss.get(url).status_code == 200
            assert boss.get(url).status_code == 200
        for name in ("host-b.example.org", "else.example.org"):
            with httpx.Client(verify=client_context(authority, name)) as other:
                reply = other.get(url)
                assert reply.status_code == 403
                assert "'manage' is missing" in reply.json()["detail"]
        for context in (client_context(authority), client_context(trustme.CA(), "boss.example.org")):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with httpx.Client(verify=context) as stranger, pytest.raises(httpx.TransportError):
                stranger.get(url)
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))


def test_whoever_sends_nothing_or_half_a_head_is_let_go(api: Api, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_S", 0.4)
    path = str(short / "s")
    halves = (b"", b"GET /v1/migrations HTTP/1.1\r\nHo",
              b"GET /v1/migrations HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/mig")  # fmt: skip
    with served(api, Address("unix", path=path)):
        for half in halves:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(path)
                sock.sendall(half)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(65536):
                        pass
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://virtmig") as client:
            assert client.get("/v1/migrations").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(api: Api, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.3)
    path = str(short / "s")
    head = b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with served(api, Address("unix", path=path)), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(head + b'{"dom')
        reply = b"".join(iter(lambda: sock.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"5 bytes came within 0.3 s" in reply


def test_a_peer_with_too_many_idle_connections_loses_its_own(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_WAITING_OF_PEER", 5)
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 8)
    with served(api, LOOPBACK, plain=True) as address, contextlib.ExitStack() as sockets:

        def idle(host: str) -> socket.socket:
            return sockets.enter_context(
                socket.create_connection(("127.0.0.1", address.port), timeout=10, source_address=(host, 0))
            )

        other = idle("127.0.0.2")
        many = [idle("127.0.0.1") for _ in range(20)]
        with contextlib.suppress(ConnectionResetError):
            assert many[0].recv(1) == b""
        assert httpx.get(f"http://127.0.0.1:{address.port}/v1/migrations").status_code == 200
        other.sendall(b"GET /v1/migrations HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(15) == b"HTTP/1.1 200 OK"


def test_without_the_extra_it_says_which(tmp_path: Path) -> None:
    code = """
import sys
for name in ("starlette", "uvicorn", "prometheus_client"):
    sys.modules[name] = None
from virtmig.cli.global_options import GlobalOptions
from virtmig.cli.api_commands import run_api
from virtmig.errors import RequestError
import virtmig.integrations.api
try:
    run_api({}, GlobalOptions())
except RequestError as error:
    print(error, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "which is not installed pip install 'virtmig[api]'" in done.stdout, done.stderr
