"""JSON over HTTP by TLS: the service's certificates, who calls from where, and who cannot pretend to be another."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from helpers.certificates import HERE, Authority, Pair
from helpers.web import JSON, Web, answering
from shardyard.v1 import audit_service_pb2, audit_service_pb2_grpc, auth_service_pb2, auth_service_pb2_grpc
from shardyard_coordinator.serve.origin import KEY, claim
from shardyard_coordinator.settings import Settings
from shardyard_coordinator.web.keeper import place_of_door

WHO = "/shardyard.v1.AuthService/GetIdentity"
AUDIT = "/shardyard.v1.AuditService/ListEntries"


@dataclass
class Secured:
    """A service on TLS that wants to know who calls, with its gateway."""

    web: Web
    folder: Path
    authority: Authority

    @property
    def token(self) -> str:
        """The first admin's."""
        return (self.web.service.state / "admin-token").read_text().strip()

    def ask(
        self,
        path: str,
        body: object = None,
        *,
        token: str = "",
        source: str = "127.0.0.1",
        own: tuple[Path, Path] | None = None,
        trusts: bytes = b"",
        **headers: str,
    ) -> tuple[int, Any]:
        """A request over a connection of its own, from an address of this machine; status and answer."""
        context = ssl.create_default_context(cadata=(trusts or self.authority.pem).decode())
        if own:
            context.load_cert_chain(*own)
        host, _, port = self.web.address.rpartition(":")
        connection = http.client.HTTPSConnection(
            host, int(port), timeout=60, context=context, source_address=(source, 0)
        )
        sent = JSON | headers | ({"authorization": f"Bearer {token}"} if token else {})
        try:
            connection.request("POST", path, json.dumps(body or {}), sent)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def denials(self) -> list[tuple[str, str]]:
        """Address and reason of each denial, the newest first."""
        _, answer = self.ask(AUDIT, {"parent": "projects/-", "deniedOnly": True}, token=self.token)
        return [(each["peer"], each["outcome"]) for each in answer["entries"]]


def secured(folder: Path, *options: str) -> Iterator[Secured]:
    authority = Authority()
    certificate, key = authority.sign(*HERE).write(folder, "server")
    (folder / "ca.pem").write_bytes(authority.pem)
    files = ("--tls-cert", str(certificate), "--tls-key", str(key), "--auth", *options)
    with answering(folder / "service", *files) as web:
        yield Secured(web, folder, authority)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    yield from secured(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("certified")
    yield from secured(folder, "--client-ca", str(folder / "ca.pem"))


def reason(answer: Any) -> str:
    return str(answer["details"][0]["debug"]["reason"])


def test_calls_are_made_by_tls_alone(service: Secured) -> None:
    status, who = service.ask(WHO, token=service.token)
    assert (status, who["principal"]) == (200, "admin")
    url = f"http://{service.web.address}/healthz"
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        urllib.request.urlopen(url, timeout=60)
    with pytest.raises(ssl.SSLCertVerificationError):
        service.ask(WHO, trusts=Authority().pem)
    assert "https://" in (service.web.service.folder / "serve.log").read_text()


def test_the_audit_log_and_the_limits_see_the_callers_own_address(service: Secured) -> None:
    for at, header in enumerate(("x-forwarded-for", "forwarded", KEY, "x-real-ip"), start=2):
        status, answer = service.ask(WHO, source=f"127.0.0.{at}", **{header: "6.6.6.6"})
        assert (status, reason(answer)) == (401, "CREDENTIALS_MISSING")
        assert service.denials()[0] == (f"127.0.0.{at}", "CREDENTIALS_MISSING")
    wrong = service.token[:-3] + "AAA"
    guesses = [reason(service.ask(WHO, source="127.0.0.9", token=wrong)[1]) for _ in range(12)]
    assert guesses == ["CREDENTIALS_INVALID"] * 10 + ["RATE_LIMITED"] * 2
    assert service.ask(WHO, source="127.0.0.8", token=service.token)[0] == 200, "another address is not slowed"


async def test_nobody_but_the_door_says_whose_call_it_is(service: Secured) -> None:
    credentials = grpc.ssl_channel_credentials(service.authority.pem)
    forged = claim("a guess", "ipv4:6.6.6.6:1", None)
    async with grpc.aio.secure_channel(service.web.service.address, credentials) as channel:
        stub = auth_service_pb2_grpc.AuthServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            await stub.GetIdentity(auth_service_pb2.GetIdentityRequest(), metadata=(forged,))
    assert service.denials()[0] == ("127.0.0.1", "CREDENTIALS_MISSING")
    place = service.web.service.state / "http.sock"
    with place_of_door(service.web.service.state) as found:
        if found != place:
            pytest.skip("the test's folder is too deep for a socket")
    assert place.stat().st_mode & 0o077 == 0
    async with grpc.aio.insecure_channel(f"unix:{place}") as channel:
        stub = audit_service_pb2_grpc.AuditServiceStub(channel)
        request = audit_service_pb2.ListEntriesRequest(parent="projects/-")
        for metadata in ((), (forged,), ((KEY, b"\xff"),), ((KEY, b"[]"),)):
            bearer = ("authorization", f"Bearer {service.token}")
            with pytest.raises(grpc.RpcError) as refused:
                await stub.ListEntries(request, metadata=(*metadata, bearer))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "HTTP door" in refused.value.details()


def test_a_client_certificate_says_who_calls_as_it_does_over_grpc(certified: Secured) -> None:
    alice = written(certified, certified.authority.sign(x509.UniformResourceIdentifier("spiffe://x/alice")), "alice")
    status, who = certified.ask(WHO, own=alice)
    assert (status, who["principal"], who["credential"]) == (200, "cert:spiffe://x/alice", "certificate")
    assert certified.ask(WHO, own=alice, token=certified.token)[1]["principal"] == "admin"
    stranger = written(certified, Authority("stranger").sign(x509.DNSName("node-1")), "stranger")
    for none in (None, stranger):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            certified.ask(WHO, own=none)
    nameless = written(certified, certified.authority.sign(), "nameless")
    assert reason(certified.ask(WHO, own=nameless)[1]) == "CREDENTIALS_INVALID"


def test_certificates_and_authority_are_swapped_while_it_runs(certified: Secured) -> None:
    second = Authority("second")
    pair = second.sign(*HERE)
    old = written(certified, certified.authority.sign(x509.DNSName("old")), "old")
    new = written(certified, second.sign(x509.DNSName("new")), "new")
    (certified.folder / "server.pem").write_bytes(pair.certificate)  # Its key is still to come.
    assert certified.ask(WHO, own=old)[0] == 200
    (certified.folder / "server.key").write_bytes(pair.key)
    assert certified.ask(WHO, own=old, trusts=second.pem)[1]["principal"] == "cert:old"
    (certified.folder / "ca.pem").write_bytes(second.pem)
    assert certified.ask(WHO, own=new, trusts=second.pem)[1]["principal"] == "cert:new"
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        certified.ask(WHO, own=old, trusts=second.pem)


def written(service: Secured, pair: Pair, name: str) -> tuple[Path, Path]:
    return pair.write(service.folder, name)


def test_http_beyond_this_machine_asks_who_calls(tmp_path: Path) -> None:
    files = {"tls_cert": tmp_path / "a.pem", "tls_key": tmp_path / "a.key"}
    given = {"state_dir": tmp_path / "state", "listen": "127.0.0.1:7400", **files}
    assert Settings(**given, http="0.0.0.0:7480").authentication.is_required
    assert not Settings(**given, http="127.0.0.1:7480").authentication.is_required


def test_a_state_directory_that_is_too_deep_for_a_socket_has_it_elsewhere(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with place_of_door(deep) as place:
        assert len(str(place)) < 108 and place.parent.stat().st_mode & 0o077 == 0
    assert not place.parent.exists()
    with place_of_door(Path("/srv/state")) as place:
        assert place == Path("/srv/state/http.sock")
