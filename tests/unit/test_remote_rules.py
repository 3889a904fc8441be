"""The text of addresses and secrets, and the operator's rules about who may use them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from helpers.scripted_compute import ScriptedCompute
from shardyard.remote_uris import ObjectUri, copy_of, is_below, parse, secret_name
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.compute_wire import answer_call, made_of, read_answer, settings_of
from shardyard_coordinator.launch.compute_worker import without_values
from shardyard_coordinator.launch.frames import pack
from shardyard_coordinator.launch.process_compute import Size
from shardyard_coordinator.launch.secret_files import read_secrets
from shardyard_coordinator.serve.validation.sources import check_hub, check_uri
from shardyard_coordinator.settings import Settings
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.remote.secrets import Keys, keys_of, token_of

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("s3://lake", ObjectUri("lake", "")),
        ("s3://lake/", ObjectUri("lake", "")),
        ("s3://lake/a/b.csv", ObjectUri("lake", "a/b.csv")),
        ("s3://lake/a/", ObjectUri("lake", "a/")),
        ("s3://lake/a@b", ObjectUri("lake", "a@b")),
        (f"s3://lake/a/@sha256:{DIGEST}", ObjectUri("lake", "a/", DIGEST)),
        (f"s3://lake/@sha256:{DIGEST}", ObjectUri("lake", "", DIGEST)),
        ("s3://lake/@sha256:short", ObjectUri("lake", "@sha256:short")),
    ],
)
def test_an_address_has_a_bucket_a_key_and_perhaps_a_digest(text: str, uri: ObjectUri) -> None:
    assert parse(text) == uri and parse(str(uri)) == uri


@pytest.mark.parametrize(
    "text",
    [
        "s3:/lake/a",
        "S3://lake/a",
        "s3a://lake/a",
        "s3://",
        "s3:///a",
        "s3://La ke/a",
        "s3://a..b/c",
        "s3://lake/../a",
        "s3://lake/a//b",
        "s3://lake/./a",
        "s3://key:secret@lake/a",
        "s3://lake/" + "x" * 1025,
    ],
)
def test_what_is_not_an_address_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(?!.*key:secret)"):
        parse(text)
    (violation,) = check_uri("f", text)
    assert violation.reason is not None and "key:secret" not in violation.message


def test_a_root_holds_what_is_below_it_and_nothing_beside_it() -> None:
    root = parse("s3://lake/data")
    assert is_below(parse("s3://lake/data"), root) and is_below(parse("s3://lake/data/a"), root)
    assert is_below(parse(f"s3://lake/data/@sha256:{DIGEST}"), root)
    assert not any(is_below(parse(f"s3://{each}"), root) for each in ("lake/data2", "lake/dat", "lake", "pond/data"))
    assert is_below(parse("s3://lake/x"), parse("s3://lake"))


def test_copies_of_two_addresses_with_one_digest_are_apart() -> None:
    places = {copy_of(parse(f"s3://{each}@sha256:{DIGEST}")) for each in ("lake/a", "lake/a/", "lake/b/", "pond/a/")}
    assert len(places) == 4 and not any(".." in place for place in places)


def test_a_token_in_a_spec_is_refused_without_repeating_it() -> None:
    for token in ("hf_abcdefghijklmnop", "secret:/x", "secret://a/b", "secret://", "secret://../x"):
        (violation,) = check_hub("f", "me/bert", "", token)
        assert violation.field == "f.token" and "secret://NAME" in violation.message
        assert "hf_" not in violation.message
    assert not check_hub("f", "me/bert", "", "secret://hub.token-1")
    assert secret_name("secret://hub") == "hub"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"remote_roots": ["s3://LAKE/a"]}, "a bucket's name"),
        ({"remote_roots": [f"s3://lake/a@sha256:{DIGEST}"]}, "has a digest"),
        ({"remote_roots": ["/data"]}, "begins with s3://"),
        ({"remote_roots": ["s3://lake/a=secret://lake"]}, "--secret lake=PROJECT"),
        ({"remote_roots": ["s3://lake/a=secret://la/ke"]}, "a secret is written"),
        ({"secrets": ["lake=nosuch"]}, "no such project"),
        ({"secrets": ["lake"]}, "NAME=PROJECT"),
        ({"secrets": ["wJalrXUtnFEMI/K7MDENG=default"]}, "NAME=PROJECT"),
        ({"s3_endpoint": "minio:9000"}, "not a URL"),
        ({"s3_endpoint": "http://key:value@minio:9000"}, "without keys"),
        ({"s3_region": "eu west"}, "not a region"),
        ({"secrets_dir": "/usr/share/keys"}, "--secrets-dir"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_at_the_start(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**settings)  # type: ignore[arg-type]
    (error,) = refused.value.errors()
    assert words in error["msg"] and "wJalr" not in error["msg"] and "key:value" not in error["msg"]


def test_the_closest_root_counts_and_a_secret_is_for_its_projects_alone() -> None:
    remote = Settings(
        remote_roots=["s3://lake", "s3://lake/private=secret://lake"],  # type: ignore[arg-type]
        secrets="lake=research",  # type: ignore[arg-type]
        projects="research",  # type: ignore[arg-type]
    ).remote
    inside, outside = parse("s3://lake/private/a"), parse("s3://lake/open/a")
    assert remote.root_of(inside, "default") is None and remote.root_of(outside, "default") is not None
    found = remote.root_of(inside, "research")
    assert found is not None and found.secret == "lake"
    assert not remote.may_use("research", "other") and not Settings().remote.roots


def test_secrets_are_files_of_their_names(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "hub").write_text("  value\n")
    (folder / "large").write_bytes(b"x" * 70_000)
    (folder / "bytes").write_bytes(b"\xff\xfe")
    (folder.parent / "outside").write_text("no")
    found = read_secrets(str(folder), ["hub", "large", "bytes", "absent", "../outside", ".hidden"])
    assert found.pop("hub") == "value" and set(found.values()) == {None}


def test_keys_are_read_as_aws_writes_them_and_never_shown() -> None:
    text = "# mine\n[lake]\nAWS_ACCESS_KEY_ID=AKID\naws_secret_access_key = a+b/c=\naws_session_token = t\nregion = x"
    keys = keys_of("lake", {"lake": text}, field="f")
    assert keys == Keys("AKID", "a+b/c=", "t") and "AKID" not in repr(keys) and "a+b" not in f"{keys}"


@pytest.mark.parametrize("value", [None, "", "AKID", "aws_access_key_id=a b\naws_secret_access_key=c"])
def test_a_secret_without_usable_keys_is_refused_without_its_value(value: str | None) -> None:
    with pytest.raises(SpecError) as refused:
        keys_of("lake", {"lake": value}, field="f")
    assert refused.value.reason == "SECRET_UNUSABLE" and "lake" in refused.value.message
    assert "AKID" not in refused.value.message


@pytest.mark.parametrize("value", ["two words", "two\nlines", "naïve", "a\x00b"])
def test_a_token_that_no_header_can_carry_is_refused_before_a_library_repeats_it(value: str) -> None:
    with pytest.raises(SpecError) as refused:
        token_of("hub", {"hub": value}, field="f")
    assert refused.value.reason == "SECRET_UNUSABLE" and value not in str(refused.value)


def test_a_traceback_has_no_part_of_a_secret() -> None:
    text = "Invalid header b'Bearer hf-12345678' of aws_secret_access_key = abcdefgh; abcdefgh"
    cleaned = without_values(text, {"hub": "hf-12345678", "lake": "x\naws_secret_access_key = abcdefgh", "no": None})
    assert "12345678" not in cleaned and "abcdefgh" not in cleaned


async def test_a_cluster_gets_the_names_of_secrets_and_never_their_values(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "hub").write_text("value-of-hub")
    settings = settings_of(
        log=str(folder / "log"),
        size=Size(),
        folders=Folders(("/data",), "/cache", "/state", "/objects", (9000,)),
        warm=(),
        answerer="",
        environment={},
        secrets_dir=str(folder),
    )
    made = made_of(json.loads(json.dumps(settings)))
    assert made._secrets_dir == str(folder) and made._folders.objects == "/objects" and made._folders.ports == (9000,)
    assert "value-of-hub" not in json.dumps(settings)
    assert dict(made._folders.confine({"HF_HUB_OFFLINE": "1"}))["ports"] == [9000]
    asked: list[object] = []

    class Scripted(ScriptedCompute):
        async def inspect(self, function: str, request: bytes, **options: Any) -> bytes:
            asked.append(options["secrets"])
            return b"answer"

    options = {"caller": ["local"], "cpu_s": 1.0, "route": "", "network": True, "secrets": ["hub"]}
    payload = pack({"verb": "inspect", "function": "m:f", "options": options}, b"")
    assert read_answer(await answer_call(Scripted({}), payload)) == b"answer" and asked == [["hub"]]
