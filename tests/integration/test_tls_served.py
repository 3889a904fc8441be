"""TLS, client certificates, and the story of an operator and a user at the command line."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import ipaddress
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

import shardyard
from helpers.certificates import HERE, Authority
from helpers.served import START_S, Served, served
from helpers.service import PARENT, Service, create, refused, serving
from helpers.uploads import send_dataset
from shardyard._profiles import read_profiles
from shardyard.cli.app import run
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import auth_service_pb2_grpc, job_service_pb2_grpc
from shardyard.v1 import job_service_pb2 as jobs
from shardyard_coordinator.domain.access import Role
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.certificates import TlsUnusable, server_credentials
from shardyard_coordinator.serve.first_admin import ensure_admin
from shardyard_coordinator.serve.protection import Authentication, TlsFiles
from shardyard_coordinator.store import access as rows

LIST = jobs.ListJobsRequest(parent=PARENT)


def channel_credentials(authority: Authority, pair: Any = None) -> grpc.ChannelCredentials:
    own = (pair.key, pair.certificate) if pair else ()
    return grpc.ssl_channel_credentials(authority.pem, *own)


async def lists(port: int, credentials: grpc.ChannelCredentials) -> grpc.StatusCode:
    """How a list ends over a new connection."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        try:
            await job_service_pb2_grpc.JobServiceStub(channel).ListJobs(LIST, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_certificates_are_swapped_while_a_stream_runs(tmp_path: Path) -> None:
    first, second = Authority("first"), Authority("second")
    certificate, key = first.sign(*HERE).write(tmp_path, "server")
    tls = server_credentials(TlsFiles(certificate, key)), channel_credentials(first)
    async with serving(tmp_path, tls=tls) as service:
        await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
        request = create("story")
        request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        await service.jobs.CreateJob(request)
        watch = service.jobs.WatchJob(jobs.WatchJobRequest(name=f"{PARENT}/jobs/story"))
        assert (await asyncio.wait_for(watch.read(), 20)).events
        renewed = second.sign(*HERE)
        certificate.write_bytes(renewed.certificate)  # Its key is still to come: the pair before it stays.
        assert await lists(service.port, channel_credentials(first)) is grpc.StatusCode.OK
        key.write_bytes(b"not a key")
        assert await lists(service.port, channel_credentials(first)) is grpc.StatusCode.OK
        key.write_bytes(renewed.key)
        assert await lists(service.port, channel_credentials(second)) is grpc.StatusCode.OK
        assert await lists(service.port, channel_credentials(first)) is grpc.StatusCode.UNAVAILABLE
        await service.jobs.CancelJob(jobs.CancelJobRequest(name=f"{PARENT}/jobs/story"))
        batch = await asyncio.wait_for(watch.read(), 20)
        while not batch.events:
            batch = await asyncio.wait_for(watch.read(), 20)
        assert batch.events[-1].state.to


UNUSABLE: list[list[x509.GeneralName]] = [
    [],
    [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))],
    [x509.DNSName("node\0.example.org")],
    [x509.UniformResourceIdentifier("spiffe://example.org/\nalice")],
    [x509.RFC822Name(" alice@example.org")],
    [x509.DNSName("n" * 251)],
]


async def test_a_client_certificate_says_who_calls(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority("stranger")
    certificate, key = authority.sign(*HERE).write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    alice = authority.sign(x509.DNSName("node-1"), x509.UniformResourceIdentifier("spiffe://example.org/alice"))
    tls = server_credentials(TlsFiles(certificate, key, tmp_path / "ca.pem")), channel_credentials(authority, alice)
    async with serving(
        tmp_path, tls=tls, access=lambda clock: Access(Authentication(is_required=True), clock)
    ) as service:
        service.clock.jump_wall(time.time() - service.clock.now_us() / 1e6)
        who = await service.auth.GetIdentity(auth.GetIdentityRequest())
        assert (who.principal, who.credential) == ("cert:spiffe://example.org/alice", "certificate")
        assert (await refused(service.jobs.ListJobs(LIST))).code is grpc.StatusCode.PERMISSION_DENIED
        await service.store.write(
            lambda conn: rows.create_binding(
                conn, "default", "cert:spiffe://example.org/alice", Role.VIEWER, actor=SYSTEM, now_us=1
            ),
            SYSTEM,
        )
        await service.access.reload()
        await service.jobs.ListJobs(LIST)
        forged = (("authorization", f"Bearer sy_{'a' * 12}_{'b' * 43}"),)
        assert (await refused(service.jobs.ListJobs(LIST, metadata=forged))).reason == "CREDENTIALS_INVALID"
        known = stranger.sign(x509.DNSName("node-1"))
        for others in (None, known):
            assert await lists(service.port, channel_credentials(authority, others)) is grpc.StatusCode.UNAVAILABLE
        for names in UNUSABLE:
            nameless = channel_credentials(authority, authority.sign(*names))
            async with grpc.aio.secure_channel(f"127.0.0.1:{service.port}", nameless) as channel:
                stub = auth_service_pb2_grpc.AuthServiceStub(channel)
                failure = await refused(stub.GetIdentity(auth.GetIdentityRequest()))
                assert failure.reason == "CREDENTIALS_INVALID", names
        (tmp_path / "ca.pem").write_bytes(stranger.pem)  # The authority is another one from now on.
        for one, code in ((alice, grpc.StatusCode.UNAVAILABLE), (known, grpc.StatusCode.PERMISSION_DENIED)):
            assert await lists(service.port, channel_credentials(authority, one)) is code
        service.clock.advance(2 * 86_400)  # The connection is still open; its certificate is not valid any more.
        assert (await refused(service.jobs.ListJobs(LIST))).reason == "CREDENTIALS_EXPIRED"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    one, two = Authority().sign(*HERE), Authority().sign(*HERE)
    certificate, key = one.write(tmp_path, "one")
    _, other = two.write(tmp_path, "two")
    (tmp_path / "empty.pem").write_bytes(b"")
    for files, said in (
        (TlsFiles(certificate, other), "is not the key of the certificate"),
        (TlsFiles(key, key), "PEM file of certificates"),
        (TlsFiles(certificate, certificate), "not a private key"),
        (TlsFiles(tmp_path / "gone.pem", key), "No such file"),
        (TlsFiles(certificate, key, tmp_path / "gone.pem"), "No such file"),
        (TlsFiles(certificate, key, tmp_path / "empty.pem"), "empty.pem"),
    ):
        with pytest.raises(TlsUnusable, match=said):
            server_credentials(files)


def test_a_profile_is_used_for_its_own_server_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardyard._reach import reach_of

    def reach(address: str | None = None, profile: str | None = None) -> Any:
        return reach_of(address, None, None, ca=None, cert=None, key=None, profile=profile)

    config = tmp_path / "config.toml"
    monkeypatch.setenv("SHARDYARD_CONFIG", str(config))
    for name in ("SHARDYARD_ADDRESS", "SHARDYARD_TOKEN", "SHARDYARD_PROFILE", "SHARDYARD_CA", "SHARDYARD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    assert (reach().address, reach().token) == ("127.0.0.1:7400", None)
    config.write_text(
        'default = "lab"\n[servers.lab]\naddress = "lab:7400"\nca = "system"\ntoken = "lab-token"\nproject = "nlp"\n'
        '[servers.prod]\naddress = "prod:7400"\nca = "system"\ntoken = "prod-token"\n'
    )
    config.chmod(0o600)
    assert (reach().address, reach().token, reach().project) == ("lab:7400", "lab-token", "nlp")
    with monkeypatch.context() as patch:
        patch.setenv("SHARDYARD_PROJECT", "vision")
        assert reach().project == "vision"
    assert reach("127.0.0.1:7400").token is None
    assert reach(profile="prod").token == "prod-token"
    monkeypatch.setenv("SHARDYARD_TOKEN", "mine")
    assert reach(profile="prod").token == "prod-token"
    assert reach().token == "mine"
    monkeypatch.delenv("SHARDYARD_TOKEN")
    monkeypatch.setenv("SHARDYARD_ADDRESS", "127.0.0.1:9")
    assert (reach().address, reach().token) == ("127.0.0.1:9", None)
    for given, said in (({"profile": "nope"}, "lab, prod"), ({"address": "x:1", "profile": "lab"}, "leave one")):
        with pytest.raises(shardyard.InvalidArgument, match=said):
            reach(**given)
    config.chmod(0o644)
    with pytest.raises(shardyard.FailedPrecondition, match="chmod 600"):
        read_profiles()
    config.chmod(0o600)
    for broken in (
        "default = [",
        "[servers.a]\naddress = 7\n",
        '[servers.a]\naddress = "a:1"\nsecret = "x"\n',
        "servers = 1",
    ):
        config.write_text(broken)
        with pytest.raises(shardyard.FailedPrecondition, match=r"config\.toml"):
            read_profiles()


@dataclasses.dataclass
class Operated:
    """A service on TLS with its first admin, and the command line in an environment of its own."""

    service: Service
    folder: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    @property
    def admin(self) -> str:
        return (self.folder / "admin-token").read_text().strip()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.service.port}"

    async def shardyard(self, *command: str, text: str = "", **environment: str) -> tuple[int, str, str]:
        """Runs a command in a thread; its exit code, what it printed, and its errors."""
        with self.patch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO(text))
            self.capture.readouterr()
            code = await asyncio.to_thread(run, list(command))
            said = self.capture.readouterr()
        return code, said.out, said.err

    async def as_admin(self, *command: str) -> Any:
        code, out, err = await self.shardyard(*command, "--json")
        assert code == 0, out + err
        return json.loads(out)


@pytest.fixture
async def operated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Operated]:
    for name in ("ADDRESS", "TOKEN", "PROFILE", "PROJECT", "CA"):
        monkeypatch.delenv(f"SHARDYARD_{name}", raising=False)
    monkeypatch.setenv("SHARDYARD_CONFIG", str(tmp_path / "config" / "config.toml"))
    authority = Authority()
    certificate, key = authority.sign(*HERE).write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    tls = server_credentials(TlsFiles(certificate, key)), channel_credentials(authority)
    async with serving(tmp_path, tls=tls, access=guarded_access) as service:
        assert await ensure_admin(service.store, tmp_path, service.clock) == tmp_path / "admin-token"
        await service.access.reload()
        yield Operated(service, tmp_path, monkeypatch, capsys)


def guarded_access(clock: Any) -> Access:
    return Access(Authentication(is_required=True), clock)


async def test_an_admin_logs_in_and_lets_others_in_at_the_command_line(operated: Operated) -> None:
    token, ca, address = operated.admin, str(operated.folder / "ca.pem"), operated.address
    code, _, err = await operated.shardyard("jobs", "--address", address, "--ca", ca)
    assert code == 1 and "CREDENTIALS_MISSING" in err
    login = ("login", "lab", "--address", address, "--ca", ca)
    code, out, err = await operated.shardyard(*login, text=f"{token[:-3]}AAA\n")
    assert code == 1 and "CREDENTIALS_INVALID" in err and token[:-3] not in out + err
    config = operated.folder / "config" / "config.toml"
    assert not config.exists()
    code, out, err = await operated.shardyard(*login, text=f"{token}\n")
    assert code == 0 and f"logged in to {address} as admin" in out and token not in out + err
    assert config.stat().st_mode & 0o777 == 0o600

    assert (await operated.as_admin("whoami"))["principal"] == "admin"
    alice = await operated.as_admin("create-token", "alice", "--scope", "submitter@default", "--ttl", "1h")
    assert alice["scopes"] == [{"role": "submitter", "project": "projects/default"}]
    hers = {"SHARDYARD_TOKEN": alice["secret"]}
    code, _, err = await operated.shardyard("jobs", **hers)
    assert code == 1 and "ACCESS_DENIED" in err and "alice" in err
    assert (await operated.as_admin("grant", "alice", "submitter"))["role"] == "submitter"
    assert [each["member"] for each in await operated.as_admin("roles")] == ["alice"]
    assert await operated.shardyard("jobs", **hers) == (0, "no jobs\n", "")
    _, out, _ = await operated.shardyard("whoami", **hers)
    assert "alice" in out and "submitter in default" in out
    assert {each["principal"] for each in await operated.as_admin("tokens")} == {"admin", "alice"}
    await operated.as_admin("withdraw", "alice", "submitter")
    assert (await operated.as_admin("revoke-token", alice["name"]))["revoke_time"]
    code, _, err = await operated.shardyard("jobs", **hers)
    assert code == 1 and "CREDENTIALS_EXPIRED" in err and alice["secret"] not in err

    entries = await operated.as_admin("audit", "--all-projects", "--limit", "100")
    methods = [each["method"].rpartition("/")[2] for each in entries if each["outcome"] == "OK"]
    assert methods[:4] == ["RevokeToken", "DeleteRoleBinding", "CreateRoleBinding", "CreateToken"]
    assert alice["secret"] not in json.dumps(entries) and token not in json.dumps(entries)
    denied = await operated.as_admin("audit", "--all-projects", "--denied")
    assert {"ACCESS_DENIED", "CREDENTIALS_EXPIRED"} <= {each["outcome"] for each in denied}
    _, out, _ = await operated.shardyard("audit", "--all-projects")
    assert "alice" in out and "RevokeToken" in out
    code, _, err = await operated.shardyard("grant", "bad name", "viewer")
    assert code == 1 and "member" in err
    code, _, err = await operated.shardyard("whoami", "--profile", "nope")
    assert code == 1 and "lab" in err


async def test_the_sdk_sends_a_token_by_tls_only_and_says_what_is_wrong(operated: Operated) -> None:
    token, ca, address = operated.admin, operated.folder / "ca.pem", operated.address
    async with shardyard.AsyncClient(address, token, ca=ca) as client:
        assert (await client.access.identity()).principal == "admin"
        made, secret = await client.access.create_token("bob", scopes=["viewer"], ttl="2h")
        assert made.scopes[0].role == "viewer" and secret.startswith("sy_")
        assert [each.name async for each in client.access.tokens(principal="bob")] == [made.name]
        assert (await client.access.revoke_token(made.name)).revoke_time is not None
        assert [each async for each in client.access.tokens(principal="bob")] == []
        with pytest.raises(shardyard.NotFound):
            await client.access.withdraw("bob", "viewer")
        with pytest.raises(shardyard.InvalidArgument, match="operator"):
            await client.access.grant("bob", "king")
    (operated.folder / "other.pem").write_bytes(Authority().pem)
    async with shardyard.AsyncClient(address, token, ca=operated.folder / "other.pem", reconnect_for=0) as client:
        with pytest.raises(shardyard.Unavailable, match="--ca"):
            await client.access.identity()
    async with shardyard.AsyncClient(address, token, reconnect_for=0) as client:
        with pytest.raises(shardyard.Unavailable):
            await client.access.identity()
    with pytest.raises(shardyard.InvalidArgument, match="not encrypted"):
        shardyard.AsyncClient("train.example.org:7400", token)
    with pytest.raises(shardyard.FailedPrecondition, match=r"gone\.pem"):
        shardyard.AsyncClient(address, token, ca=operated.folder / "gone.pem")
    file = operated.folder / "token"
    file.write_text(f"{token}\n")
    operated.patch.setenv("SHARDYARD_TOKEN_FILE", str(file))
    async with shardyard.AsyncClient(address, ca=ca) as client:
        assert (await client.access.identity()).principal == "admin"
        file.write_text("sy_replaced\n")
        os.utime(file, ns=(1, 1))
        with pytest.raises(shardyard.Unauthenticated):
            await client.access.identity()


async def test_a_certificate_that_no_client_can_accept_is_said_for_what_it_is(operated: Operated) -> None:
    authority, ca = Authority("renewed"), operated.folder / "renewed.pem"
    ca.write_bytes(authority.pem)
    elsewhere = authority.sign(x509.DNSName("train.example.org"))
    pairs = ((authority.sign(*HERE, days=-0.5), "has expired"), (authority.sign(), "name"), (elsewhere, "another name"))
    for pair, said in pairs:
        pair.write(operated.folder, "server")
        async with shardyard.AsyncClient(operated.address, operated.admin, ca=ca, reconnect_for=0) as client:
            with pytest.raises(shardyard.Unavailable, match=said):
                await client.access.identity()
    with pytest.raises(shardyard.FailedPrecondition, match="no certificate in PEM"):
        shardyard.AsyncClient(operated.address, operated.admin, ca=operated.folder / "server.key")


def test_a_service_on_tls_is_started_stopped_and_started_again(tmp_path: Path) -> None:
    certificate, key = Authority().sign(*HERE).write(tmp_path, "server")
    options = ["--tls-cert", str(certificate), "--tls-key", str(key), "--auth"]
    with served(tmp_path / "service", "local", *options) as service:
        path = service.state / "admin-token"
        said = said_after(service, starts=1)
        token = path.read_text().strip()
        assert path.stat().st_mode & 0o777 == 0o600
        assert str(path) in said and token not in said
        service.kill()
        service.start()
        said_after(service, starts=2)
        assert path.read_text().strip() == token


def said_after(service: Served, *, starts: int) -> str:
    """The log of a service once it has said so many times that it serves, and where its token is."""
    deadline = time.monotonic() + START_S
    while True:
        said = (service.folder / "serve.log").read_text()
        if said.count("serves on") >= starts and "first admin" in said:
            return said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
