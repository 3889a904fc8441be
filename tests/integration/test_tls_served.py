"""TLS, client certificates, and the story of an operator and a user at the command line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

import shardyard
from helpers.certificates import HERE, Authority
from helpers.served import Served, served
from helpers.service import PARENT, create, refused, serving
from helpers.uploads import send_dataset
from shardyard._profiles import read_profiles
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import auth_service_pb2_grpc, job_service_pb2_grpc
from shardyard.v1 import job_service_pb2 as jobs
from shardyard_coordinator.domain.access import Role
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.certificates import Tls, TlsUnusable
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
    tls = Tls(TlsFiles(certificate, key)).credentials(), channel_credentials(first)
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


async def test_a_client_certificate_says_who_calls(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority("stranger")
    certificate, key = authority.sign(*HERE).write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    alice = authority.sign(x509.DNSName("node-1"), x509.UniformResourceIdentifier("spiffe://example.org/alice"))
    tls = Tls(TlsFiles(certificate, key, tmp_path / "ca.pem")).credentials(), channel_credentials(authority, alice)
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
        nameless = channel_credentials(authority, authority.sign())
        async with grpc.aio.secure_channel(f"127.0.0.1:{service.port}", nameless) as channel:
            stub = auth_service_pb2_grpc.AuthServiceStub(channel)
            assert (await refused(stub.GetIdentity(auth.GetIdentityRequest()))).reason == "CREDENTIALS_INVALID"
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
            Tls(files)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service on TLS that asks for tokens."""
    folder, authority = tmp_path_factory.mktemp("tls"), Authority()
    certificate, key = authority.sign(*HERE).write(folder, "server")
    (folder / "ca.pem").write_bytes(authority.pem)
    options = ["--tls-cert", str(certificate), "--tls-key", str(key), "--auth", "--project", "other"]
    reach = {"SHARDYARD_CA": str(folder / "ca.pem"), "SHARDYARD_CONFIG": str(folder / "config" / "config.toml")}
    with served(folder / "service", "local", *options, environment=reach) as running:
        yield running


def run(service: Served, *command: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """The command in the environment of the service, with a text on its standard input."""
    environment = {**service.environment, **more}
    environment.pop("SHARDYARD_TOKEN", None) if "SHARDYARD_TOKEN" not in more else None
    return subprocess.run(
        ["shardyard", *command], env=environment, input=text, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_first_admin_logs_in_and_lets_others_in(service: Served, tmp_path: Path) -> None:
    path = service.state / "admin-token"
    token = path.read_text().strip()
    said = (service.folder / "serve.log").read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(path) in said and token not in said

    missing = run(service, "jobs")
    assert missing.returncode == 1 and "CREDENTIALS_MISSING" in missing.stderr
    wrong = run(service, "login", "lab", "--address", service.address, text=f"{token[:-3]}AAA")
    assert wrong.returncode == 1 and "CREDENTIALS_INVALID" in wrong.stderr and token[:-3] not in wrong.stderr
    config = Path(service.environment["SHARDYARD_CONFIG"])
    assert not config.exists()
    ca = service.environment["SHARDYARD_CA"]
    login = run(service, "login", "lab", "--address", service.address, "--ca", ca, text=token)
    assert login.returncode == 0, login.stderr
    assert f"logged in to {service.address} as admin" in login.stdout and token not in login.stdout
    assert config.stat().st_mode & 0o777 == 0o600

    def as_admin(*command: str) -> Any:
        done = run(service, *command, "--json", SHARDYARD_ADDRESS="", SHARDYARD_CA="")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert as_admin("whoami")["principal"] == "admin"
    alice = as_admin("create-token", "alice", "--scope", "submitter@default", "--ttl", "1h")
    assert alice["scopes"] == [{"role": "submitter", "project": "projects/default"}]
    refused_ = run(service, "jobs", SHARDYARD_TOKEN=alice["secret"])
    assert refused_.returncode == 1 and "ACCESS_DENIED" in refused_.stderr
    assert as_admin("grant", "alice", "submitter")["role"] == "submitter"
    assert [each["member"] for each in as_admin("roles")] == ["alice"]
    assert run(service, "jobs", SHARDYARD_TOKEN=alice["secret"]).stdout == "no jobs\n"
    who = run(service, "whoami", SHARDYARD_TOKEN=alice["secret"])
    assert "alice" in who.stdout and "submitter in default" in who.stdout
    assert {each["principal"] for each in as_admin("tokens")} == {"admin", "alice"}
    as_admin("withdraw", "alice", "submitter")
    assert as_admin("revoke-token", alice["name"])["revoke_time"]
    ended = run(service, "jobs", SHARDYARD_TOKEN=alice["secret"])
    assert "CREDENTIALS_EXPIRED" in ended.stderr and alice["secret"] not in ended.stderr
    entries = as_admin("audit", "--all-projects", "--since", "1h")
    methods = [each["method"].rpartition("/")[2] for each in entries if each["outcome"] == "OK"]
    assert methods[:4] == ["RevokeToken", "DeleteRoleBinding", "CreateRoleBinding", "CreateToken"]
    assert alice["secret"] not in json.dumps(entries) and token not in json.dumps(entries)
    assert "ACCESS_DENIED" in {each["outcome"] for each in as_admin("audit", "--all-projects", "--denied")}
    assert "alice" in run(service, "audit", "--all-projects", SHARDYARD_TOKEN=token).stdout


def test_the_sdk_sends_a_token_by_tls_only_and_says_what_is_wrong(service: Served, tmp_path: Path) -> None:
    token, ca = (service.state / "admin-token").read_text().strip(), service.environment["SHARDYARD_CA"]
    with shardyard.Client(service.address, token, ca=ca) as client:
        assert client.access.identity().principal == "admin"
        assert client.server_info().warnings == ()
        made, secret = client.access.create_token("bob", scopes=["viewer"], ttl="2h")
        assert made.scopes[0].role == "viewer" and secret.startswith("sy_")
        assert [each.name for each in client.access.tokens(principal="bob")] == [made.name]
        assert client.access.revoke_token(made.name).revoke_time is not None
        assert not list(client.access.tokens(principal="bob"))
    (tmp_path / "other.pem").write_bytes(Authority().pem)
    with (
        shardyard.Client(service.address, token, ca=tmp_path / "other.pem", reconnect_for=0) as client,
        pytest.raises(shardyard.Unavailable, match="--ca"),
    ):
        client.access.identity()
    with pytest.raises(shardyard.InvalidArgument, match="not encrypted"):
        shardyard.Client("train.example.org:7400", token)
    shardyard.Client("train.example.org:7400", token, ca=ca).close()
    with pytest.raises(shardyard.FailedPrecondition, match=r"gone\.pem"):
        shardyard.Client(service.address, token, ca=tmp_path / "gone.pem")
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDYARD_TOKEN_FILE", str(file))
        with shardyard.Client(service.address, ca=ca) as client:
            assert client.access.identity().principal == "admin"
            file.write_text("sy_replaced\n")
            os.utime(file, ns=(1, 1))
            with pytest.raises(shardyard.Unauthenticated):
                client.access.identity()


def test_a_profile_is_used_for_its_own_server_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardyard._reach import reach_of

    def reach(address: str | None = None, profile: str | None = None) -> Any:
        return reach_of(address, None, None, ca=None, cert=None, key=None, profile=profile)

    config = tmp_path / "config.toml"
    monkeypatch.setenv("SHARDYARD_CONFIG", str(config))
    for name in ("SHARDYARD_ADDRESS", "SHARDYARD_TOKEN", "SHARDYARD_PROFILE", "SHARDYARD_CA"):
        monkeypatch.delenv(name, raising=False)
    assert (reach().address, reach().token) == ("127.0.0.1:7400", None)
    config.write_text(
        'default = "lab"\n[servers.lab]\naddress = "lab:7400"\nca = "system"\ntoken = "lab-token"\nproject = "nlp"\n'
        '[servers.prod]\naddress = "prod:7400"\nca = "system"\ntoken = "prod-token"\n'
    )
    config.chmod(0o600)
    assert (reach().address, reach().token, reach().project) == ("lab:7400", "lab-token", "nlp")
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
