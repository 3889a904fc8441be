"""Who is let in: tokens and JWTs, right, forged, replayed, expired or of another issuer; and what is recorded."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from helpers.guarded import AUDIENCE, ISSUER, Guarded, guarded, metadata
from helpers.service import PARENT, create, failure_of, refused
from helpers.uploads import header, messages, whole
from shardyard.v1 import audit_service_pb2 as audit
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import model_service_pb2 as models
from shardyard_coordinator.monitoring.logs import TextLines
from shardyard_coordinator.serve.first_admin import ensure_admin
from shardyard_coordinator.serve.scrub import scrub
from shardyard_coordinator.store import tables

LIST = jobs.ListJobsRequest(parent=PARENT)
WHO = auth.GetIdentityRequest()


@pytest.fixture
async def service(tmp_path: Any) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        running.issuer.add_rsa("rsa")
        running.issuer.add_ec("ec")
        yield running


async def reason(service: Guarded, sent: Any) -> tuple[str, str]:
    """Why a call with this metadata is refused, and in which words."""
    failure = await refused(service.service.jobs.ListJobs(LIST, metadata=sent))
    assert failure.code is grpc.StatusCode.UNAUTHENTICATED
    return failure.reason, failure.message


async def test_forged_tokens_are_answered_alike_whichever_part_is_wrong(service: Guarded) -> None:
    token = await service.member("alice", "viewer")
    await service.service.jobs.ListJobs(LIST, metadata=metadata(token))
    known_id, secret = token.split("_", 2)[1:]
    other = await service.token("bob")
    forged = [
        f"sy_{known_id}_{'A' * 43}",
        f"sy_{'a' * 12}_{secret}",
        f"sy_{known_id}_{other.split('_', 2)[2]}",
        token[:-1],
        f"{token}x",
        token.upper(),
        f"sy_{known_id}_{hashlib.sha256(secret.encode()).hexdigest()}",
        "sy_",
    ]
    answers = {await reason(service, metadata(each)) for each in forged if each.startswith("sy_")}
    assert len(answers) == 1 and next(iter(answers))[0] == "CREDENTIALS_INVALID"
    for sent in (
        metadata(token, token),
        metadata(token.upper()),
        (("authorization", f"Basic {base64.b64encode(token.encode()).decode()}"),),
        (("authorization", token),),
        (("authorization", "Bearer "),),
    ):
        assert (await reason(service, sent))[0] == "CREDENTIALS_INVALID"
    assert (await reason(service, ()))[0] == "CREDENTIALS_MISSING"
    await service.service.jobs.ListJobs(LIST, metadata=(("authorization", f"bearer {token}"),))


async def test_guessing_a_secret_is_slow_and_locks_out_no_other_token(service: Guarded) -> None:
    token, other = await service.member("alice", "viewer"), await service.member("bob", "viewer")
    known_id = token.split("_", 2)[1]
    seen = []
    for at in range(15):
        guess = f"sy_{known_id}_{at:043d}"
        seen.append((await refused(service.service.jobs.ListJobs(LIST, metadata=metadata(guess)))).reason)
    assert seen == ["CREDENTIALS_INVALID"] * 10 + ["RATE_LIMITED"] * 5
    failure = await refused(service.service.jobs.ListJobs(LIST, metadata=metadata(token)))
    assert failure.reason == "RATE_LIMITED" and failure.retry_after_s is not None and failure.retry_after_s > 5
    await service.service.jobs.ListJobs(LIST, metadata=metadata(other))
    service.service.clock.advance(11)
    await service.service.jobs.ListJobs(LIST, metadata=metadata(token))


async def test_a_token_expires_and_is_shown_without_its_secret(service: Guarded) -> None:
    token = await service.member("alice", "viewer")
    listed = await service.service.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(service.admin))
    assert token.split("_", 2)[2] not in str(listed)
    assert [each.principal for each in listed.tokens] == ["alice", "admin"]
    assert not listed.tokens[1].HasField("expire_time")
    rows = await service.service.store.read(lambda conn: conn.execute(select(tables.token)).all())
    assert len(rows) == 2 and token.split("_", 2)[2] not in str(rows)
    service.service.clock.advance(90 * 86_400 + 1)
    assert (await reason(service, metadata(token)))[0] == "CREDENTIALS_EXPIRED"
    shown = await service.service.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(service.admin))
    assert [each.principal for each in shown.tokens] == ["admin"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"principal": "local"}, "principal"),
        ({"principal": "system"}, "principal"),
        ({"principal": "oidc:alice"}, "principal"),
        ({"principal": ""}, "principal"),
        ({"principal": "a", "display_name": "a\nb"}, "display_name"),
        ({"principal": "a", "scopes": [auth.Grant(role=1, project="nlp")]}, "scopes[0].project"),
        ({"principal": "a", "scopes": [auth.Grant()]}, "scopes[0].role"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_token_for_a_name_of_the_service_or_of_others_is_refused(
    service: Guarded, fields: dict[str, Any], field: str
) -> None:
    call = service.service.auth.CreateToken(auth.CreateTokenRequest(**fields), metadata=metadata(service.admin))
    failure = await refused(call)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT and field in failure.violations


ODD_GROUPS = ["a\0b", "a\nb", "a\u202eb", "\ud800", " nlp team", "nlp team\u00a0", "", "a" * 250]


async def test_jwts_of_the_issuer_are_let_in_with_their_groups(service: Guarded) -> None:
    await service.grant("group:nlp team", "viewer")
    await service.grant("oidc:carol@example.org", "submitter", "other")
    for kid in ("rsa", "ec"):
        token = service.issuer.token(
            kid, service.now_s, sub="carol@example.org", groups=["nlp team", "group:x", 7, *ODD_GROUPS]
        )
        who = await service.service.auth.GetIdentity(WHO, metadata=metadata(token))
        assert (who.principal, who.credential) == ("oidc:carol@example.org", "oidc")
        assert sorted(who.groups) == ["group:group:x", "group:nlp team"]
        await service.service.jobs.ListJobs(LIST, metadata=metadata(token))
    # The issuer cannot name a principal of tokens.
    token = service.issuer.token("rsa", service.now_s, sub="admin")
    failure = await refused(service.service.jobs.ListJobs(LIST, metadata=metadata(token)))
    assert failure.code is grpc.StatusCode.PERMISSION_DENIED


async def test_jwts_that_are_wrong_in_one_way_each_are_refused(service: Guarded) -> None:
    make, now = service.issuer.token, service.now_s
    stranger = type(service.issuer)()
    stranger.add_rsa("rsa")
    wrong = {
        "of another issuer": make("rsa", now, iss=f"{ISSUER}/"),
        "for another audience": make("rsa", now, aud="others"),
        "for no audience": make("rsa", now, aud=None),
        "without an end": make("rsa", now, exp=None),
        "an end that is a text": make("rsa", now, exp="tomorrow"),
        "not valid yet": make("rsa", now, nbf=int(now) + 120),
        "signed by a stranger": stranger.token("rsa", now),
        "without a holder": make("rsa", now, sub=""),
        "a holder with a line end": make("rsa", now, sub="a\nb"),
        "a holder with NUL": make("rsa", now, sub="a\0b"),
        "a holder that turns text around": make("rsa", now, sub="a\u202eb"),
        "half a character": make("rsa", now, sub="a\ud800"),
        "spaces around a holder": make("rsa", now, sub=" alice"),
        "an odd space": make("rsa", now, sub="alice\u00a0"),
        "a holder that is too long": make("rsa", now, sub="a" * 251),
        "a holder that is no text": make("rsa", now, sub=["alice"]),
        "another kind": make("rsa", now, {"typ": "logout+jwt"}),
        "a critical extension": make("rsa", now, {"crit": ["x-y"], "x-y": 1}),
        "of no key": make("rsa", now, {"kid": "nobody"}),
        "by another key's name": make("rsa", now, {"kid": "ec"}),
        "of no algorithm": _unsigned(make("rsa", now)),
        "signed with the public key": _signed_with_the_public_key(service),
        "cut": make("rsa", now)[:-20],
        "no JWT": "abc.def",
        "far too long": "e" * 7000,
    }
    for what, token in wrong.items():
        assert (await reason(service, metadata(token)))[0] == "CREDENTIALS_INVALID", what
        assert len(token) < 20 or token[-20:] not in (await reason(service, metadata(token)))[1], what
    old = make("rsa", now - 661)
    assert (await reason(service, metadata(old)))[0] == "CREDENTIALS_EXPIRED"
    await service.service.auth.GetIdentity(WHO, metadata=metadata(make("rsa", now - 650)))  # Within the skew.
    both = make("rsa", now, aud=[AUDIENCE, "others"])
    await service.service.auth.GetIdentity(WHO, metadata=metadata(both))


def _unsigned(token: str) -> str:
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "rsa"}).encode()).rstrip(b"=").decode()
    return f"{head}.{token.split('.')[1]}."


def _signed_with_the_public_key(service: Guarded) -> str:
    from cryptography.hazmat.primitives import serialization

    public = (
        service.issuer.keys["rsa"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    body = service.issuer.token("rsa", service.now_s).split(".")[1]
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "rsa"}).encode()).rstrip(b"=").decode()
    made = hmac.digest(public, f"{head}.{body}".encode(), "sha256")
    return f"{head}.{body}.{base64.urlsafe_b64encode(made).rstrip(b'=').decode()}"


async def test_invented_keys_make_no_storm_on_the_issuer_and_new_ones_are_found(service: Guarded) -> None:
    await service.service.auth.GetIdentity(WHO, metadata=metadata(service.issuer.token("rsa", service.now_s)))
    for at in range(20):
        token = service.issuer.token("rsa", service.now_s, {"kid": f"invented-{at}"})
        assert (await reason(service, metadata(token)))[0] == "CREDENTIALS_INVALID"
    assert service.issuer.fetches == 1
    service.issuer.add_rsa("new")
    service.service.clock.advance(61)
    await service.service.auth.GetIdentity(WHO, metadata=metadata(service.issuer.token("new", service.now_s)))
    assert service.issuer.fetches == 2


async def test_an_issuer_that_is_away_is_not_the_callers_fault(service: Guarded) -> None:
    service.issuer.is_away = True
    token = service.issuer.token("rsa", service.now_s)
    failure = await refused(service.service.jobs.ListJobs(LIST, metadata=metadata(token)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "ISSUER_UNREACHABLE")
    assert failure.retry_after_s is not None
    await service.service.jobs.ListJobs(LIST, metadata=metadata(service.admin))
    service.issuer.is_away = False
    service.service.clock.advance(61)
    await service.service.auth.GetIdentity(WHO, metadata=metadata(token))
    # Known keys outlive an outage of a day, and no longer.
    service.issuer.is_away = True
    service.service.clock.advance(86_000)
    late = service.issuer.token("rsa", service.now_s)
    await service.service.auth.GetIdentity(WHO, metadata=metadata(late))
    service.service.clock.advance(2_000)
    late = service.issuer.token("rsa", service.now_s)
    failure = await refused(service.service.auth.GetIdentity(WHO, metadata=metadata(late)))
    assert failure.reason == "ISSUER_UNREACHABLE"


async def test_every_change_and_every_denial_is_recorded(service: Guarded) -> None:
    alice = metadata(await service.member("alice", "submitter"))
    bob = metadata(await service.member("bob", "viewer"))
    calls, files = service.service, {"a": b"x"}
    await calls.datasets.CreateDataset(messages(header("corpus", files), *whole(files)), metadata=alice)
    upload = [models.CreateModelRequest(header=header("m", files))]
    upload += [models.CreateModelRequest(chunk=chunk) for chunk in whole(files)]
    await calls.models.CreateModel(upload, metadata=alice)
    request = create("job")
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    await calls.jobs.CreateJob(request, metadata=alice)
    name = f"{PARENT}/jobs/job"
    await calls.jobs.PauseJob(jobs.PauseJobRequest(name=name), metadata=alice)
    await calls.jobs.ResumeJob(jobs.ResumeJobRequest(name=name), metadata=alice)
    failure = await refused(calls.jobs.CancelJob(jobs.CancelJobRequest(name=name), metadata=bob))
    assert failure.code is grpc.StatusCode.PERMISSION_DENIED
    await calls.jobs.CancelJob(jobs.CancelJobRequest(name=name), metadata=alice)
    await calls.jobs.CancelJob(jobs.CancelJobRequest(name=name), metadata=alice)  # Changes nothing.
    await calls.jobs.DeleteJob(jobs.DeleteJobRequest(name=name), metadata=alice)
    await calls.models.DeleteModel(models.DeleteModelRequest(name=f"{PARENT}/models/m"), metadata=alice)
    await calls.datasets.DeleteDataset(datasets.DeleteDatasetRequest(name=f"{PARENT}/datasets/corpus"), metadata=alice)
    with pytest.raises(grpc.RpcError):
        await calls.jobs.ListJobs(LIST)
    entries = await recorded(service)
    assert [(each.principal, each.method.rpartition("/")[2], each.resource, each.outcome) for each in entries] == [
        ("alice", "CreateDataset", f"{PARENT}/datasets/corpus", "OK"),
        ("alice", "CreateDataset", f"{PARENT}/datasets/corpus", "OK"),
        ("alice", "CreateModel", f"{PARENT}/models/m", "OK"),
        ("alice", "CreateModel", f"{PARENT}/models/m", "OK"),
        ("alice", "CreateJob", name, "OK"),
        ("alice", "PauseJob", name, "OK"),
        ("alice", "ResumeJob", name, "OK"),
        ("bob", "CancelJob", name, "ACCESS_DENIED"),
        ("alice", "CancelJob", name, "OK"),
        ("alice", "DeleteJob", name, "OK"),
        ("alice", "DeleteModel", f"{PARENT}/models/m", "OK"),
        ("alice", "DeleteDataset", f"{PARENT}/datasets/corpus", "OK"),
        ("", "ListJobs", "", "CREDENTIALS_MISSING"),
    ]
    assert all(each.peer == "127.0.0.1" and each.request_id for each in entries)
    assert {each.credential for each in entries if each.principal} <= {
        token.name
        for token in (await calls.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(service.admin))).tokens
    }
    mine = audit.ListEntriesRequest(parent=PARENT, denied_only=True)
    seen = await calls.audit.ListEntries(mine, metadata=metadata(await service.member("op", "operator")))
    assert [each.outcome for each in seen.entries] == ["ACCESS_DENIED"]


async def test_a_caller_that_is_denied_again_and_again_does_not_fill_the_log(service: Guarded) -> None:
    bob = metadata(await service.member("bob", "viewer"))
    denied = jobs.CancelJobRequest(name=f"{PARENT}/jobs/none")
    for _ in range(60):
        await refused(service.service.jobs.CancelJob(denied, metadata=bob))
    service.service.clock.advance(11)
    await refused(service.service.jobs.CancelJob(denied, metadata=bob))
    counts = [each.count for each in await recorded(service) if each.principal == "bob"]
    assert len(counts) == 21 and sum(counts) == 61


async def recorded(service: Guarded) -> list[audit.AuditEntry]:
    """The audit log without what the admin did for the test, the oldest first."""
    request = audit.ListEntriesRequest(parent="projects/-", page_size=1000)
    answer = await service.service.audit.ListEntries(request, metadata=metadata(service.admin))
    return [each for each in reversed(answer.entries) if each.principal not in ("admin", "service")]


async def test_a_new_admin_is_made_only_if_there_is_none_left(service: Guarded, tmp_path: Any) -> None:
    store, clock = service.service.store, service.service.clock
    assert await ensure_admin(store, tmp_path, clock) is None
    listed = await service.service.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(service.admin))
    revoke = auth.RevokeTokenRequest(name=listed.tokens[0].name)
    await service.service.auth.RevokeToken(revoke, metadata=metadata(service.admin))
    assert (await reason(service, metadata(service.admin)))[0] == "CREDENTIALS_EXPIRED"
    path = await ensure_admin(store, tmp_path, clock)
    assert path is not None
    await service.service.access.reload()
    again = path.read_text().strip()
    assert again != service.admin
    await service.service.auth.CreateRoleBinding(
        auth.CreateRoleBindingRequest(parent="projects/-", member="group:admins", role=auth.ROLE_ADMIN),
        metadata=metadata(again),
    )
    listed = await service.service.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(again))
    revoke = auth.RevokeTokenRequest(name=listed.tokens[0].name)
    await service.service.auth.RevokeToken(revoke, metadata=metadata(again))
    assert await ensure_admin(store, tmp_path, clock) is None  # The issuer's admins are there.


SECRETS = [
    f"sy_{'a2' * 6}_{'A-_9' * 10}abc",
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "AKIAIOSFODNN7EXAMPLE",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_leaves_in_an_error_or_a_log(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert secret not in scrub(f"the value `{secret}` is wrong")
    assert scrub(f"https://user:{secret}@host/x") == "https://…@host/x"
    root, handler = logging.getLogger(), logging.StreamHandler()
    handler.setFormatter(TextLines())
    root.addHandler(handler)
    try:
        try:
            raise ValueError(secret)
        except ValueError:
            logging.getLogger("x").exception("failed with %s", secret)
    finally:
        root.removeHandler(handler)
    said = capsys.readouterr().err
    assert "failed with …" in said and secret not in said


async def test_a_secret_in_a_request_is_not_said_back(service: Guarded) -> None:
    token = await service.member("alice", "submitter")
    request = jobs.GetJobRequest(name=f"{PARENT}/jobs/{token}")
    try:
        await service.service.jobs.GetJob(request, metadata=metadata(token))
    except grpc.RpcError as error:
        failure = failure_of(error)
    assert failure.reason == "SPEC_INVALID" and token.split("_", 2)[2][:12] not in str(failure)
