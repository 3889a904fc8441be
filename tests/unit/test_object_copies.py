"""Copies of objects: whole or not there, from a store that fails, lies, and changes its objects."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.loopback_s3 import BUCKET, LoopbackS3, loopback_s3
from helpers.ports import free_port
from shardyard.remote_uris import copy_of, parse
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.remote import fetch as fetching

KEYS = "aws_access_key_id = AKID\naws_secret_access_key = not-a-real-one\n"
FIELD = "spec.train_data.uri"


@pytest.fixture
def store() -> Iterator[LoopbackS3]:
    with loopback_s3() as found:
        yield found


def asked(
    store: LoopbackS3, folder: Path, uri: str = f"s3://{BUCKET}/data", **fields: object
) -> worker_pb2.FetchResult:
    options = {"endpoint": store.endpoint, "most_bytes": 2**30, "budget_s": 30.0, **fields}
    request = worker_pb2.FetchRequest(field=FIELD, uri=uri, objects_dir=str(folder), **options)  # type: ignore[arg-type]
    secrets = {"lake": KEYS} if request.secret else {}
    return worker_pb2.FetchResult.FromString(fetching.fetch(request.SerializeToString(), secrets=secrets))


def copied(result: worker_pb2.FetchResult, folder: Path) -> dict[str, bytes]:
    assert not result.violations, result.violations
    place = folder / copy_of(parse(result.uri))
    if place.is_file():
        return {place.name: place.read_bytes()}
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(result: worker_pb2.FetchResult) -> tuple[str, str]:
    (violation,) = result.violations
    assert violation.field == FIELD
    return violation.reason, violation.message


def test_objects_below_a_prefix_are_copied_once_and_pinned(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a.csv", "a,b\n")
    store.put("data/sub/b.csv", "c,d\n")
    store.put("data/sub/", b"")
    store.put("data2/c.csv", "no")
    first = asked(store, tmp_path)
    assert copied(first, tmp_path) == {"a.csv": b"a,b\n", "sub/b.csv": b"c,d\n"}
    num = len(store.requests)
    assert asked(store, tmp_path, f"s3://{BUCKET}/data/").uri == first.uri
    assert store.requests[num:] == ["list"]
    # A pinned URI whose copy is here needs no store at all.
    assert asked(store, tmp_path, first.uri).uri == first.uri and len(store.requests) == num + 1
    store.put("data/a.csv", "other\n")
    changed = asked(store, tmp_path)
    assert changed.uri != first.uri and copied(changed, tmp_path)["a.csv"] == b"other\n"
    assert copied(first, tmp_path)["a.csv"] == b"a,b\n"
    assert store.requests.count("data/sub/b.csv") == 1


def test_one_object_is_one_file(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a b+é%20.csv", "a\n")
    result = asked(store, tmp_path, f"s3://{BUCKET}/data/a b+é%20.csv")
    assert copied(result, tmp_path) == {"a b+é%20.csv": b"a\n"} and "list" not in store.requests


def test_an_object_that_is_not_that_of_the_digest_is_refused(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a.csv", "a\n")
    pinned = asked(store, tmp_path).uri
    store.put("data/a.csv", "b\n")
    reason, message = refused(asked(store, tmp_path / "elsewhere", pinned))
    assert reason == "DATA_CHANGED" and "@sha256" in message


def test_an_answer_that_is_broken_off_is_continued_and_never_taken_for_whole(store: LoopbackS3, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    store.put("data/big.bin", data)
    store.broken_off["data/big.bin"] = [2**20 + 17, 0, 5]
    assert copied(asked(store, tmp_path), tmp_path) == {"big.bin": data}
    store.put("data/big.bin", data[::-1])
    store.broken_off["data/big.bin"] = [100] * 50
    reason, message = refused(asked(store, tmp_path))
    assert reason == "OBJECT_STORE_UNREACHABLE" and "try again" in message
    assert not any(path.stat().st_size == len(data) and path.read_bytes() == b"" for path in tmp_path.rglob("*.part"))
    store.broken_off.clear()
    assert copied(asked(store, tmp_path), tmp_path) == {"big.bin": data[::-1]}


def test_bytes_that_are_not_those_of_the_etag_are_refused(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a.csv", "a\n", etag=hashlib.md5(b"b\n", usedforsecurity=False).hexdigest())
    reason, message = refused(asked(store, tmp_path))
    assert reason == "DATA_INVALID" and "damaged" in message and "a.csv" in message
    # The ETag of an object that was stored in parts is no MD5.
    store.put("data/a.csv", "a\n", etag="0123456789abcdef0123456789abcdef-7")
    assert copied(asked(store, tmp_path), tmp_path) == {"a.csv": b"a\n"}


def test_an_object_that_is_replaced_meanwhile_is_never_mixed(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a.csv", "a" * 100)
    store.errors["data/a.csv"] = [(412, "PreconditionFailed")]
    reason, message = refused(asked(store, tmp_path))
    assert reason == "OBJECT_STORE_UNREACHABLE" and "being replaced" in message and "a.csv" in message
    assert copied(asked(store, tmp_path), tmp_path) == {"a.csv": b"a" * 100}


def test_a_large_copy_goes_on_where_the_last_call_stopped(store: LoopbackS3, tmp_path: Path) -> None:
    data = os.urandom(4 * 2**20)
    store.put("data/big.bin", data)
    store.slow_s = 0.02
    results, asks = [], 0
    while not results or not results[-1].uri:
        results.append(asked(store, tmp_path, budget_s=0.12))
        asks += 1
        assert asks < 60, "it does not come forward"
    assert asks > 1 and copied(results[-1], tmp_path) == {"big.bin": data}
    assert not list(tmp_path.rglob(".*.kept")) and not list(tmp_path.rglob(".*.part"))


def test_what_a_killed_call_left_is_not_trusted(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a.bin", b"x" * 1000, etag="0123456789abcdef0123456789abcdef-2")
    found = asked(store, tmp_path)
    name = next((tmp_path / "objects").iterdir()).name
    for path in (*(tmp_path / "objects").iterdir(), *(tmp_path / "blobs").iterdir()):
        path.unlink()
    (tmp_path / "blobs" / f".{name}.part").write_bytes(b"y" * 400)
    store.put("data/b.bin", b"z")
    assert copied(asked(store, tmp_path), tmp_path) == {"a.bin": b"x" * 1000, "b.bin": b"z"}
    assert found.uri


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data/../../escape"], ["has an empty, . or .. part", "rename"]),
        (["data//a"], ["has an empty"]),
        (["data/a\nb"], ["do not print"]),
        (["data/" + "x" * 300], ["more than 255 bytes"]),
        (["data/A.csv", "data/a.csv"], ["one name on some disks"]),
        (["data/a", "data/a/b"], ["a file and a folder of one name"]),
    ],
)
def test_names_that_are_not_ones_of_files_are_refused(
    store: LoopbackS3, tmp_path: Path, keys: list[str], words: list[str]
) -> None:
    for key in keys:
        store.put(key, "x")
    reason, message = refused(asked(store, tmp_path / "copies"))
    assert reason == "DATA_INVALID" and all(word in message for word in words), message
    assert {path.name for path in tmp_path.rglob("*")} == {"copies", "blobs", "objects"}


def test_a_store_that_lists_other_keys_than_it_was_asked_for_is_refused(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a", "x")
    store.also_listed = ["/etc/passwd"]
    reason, message = refused(asked(store, tmp_path))
    assert reason == "DATA_INVALID" and "not below it" in message


def test_too_many_objects_are_refused_early_and_an_endless_list_ends(store: LoopbackS3, tmp_path: Path) -> None:
    for number in range(3500):
        store.put(f"data/{number}", "x")
    reason, message = refused(asked(store, tmp_path, most_objects=1500))
    assert reason == "QUOTA_EXCEEDED" and "1,500" in message and store.requests.count("list") == 2
    store.objects = {"data/a": store.objects["data/0"]}
    store.endless = True
    store.also_listed = [f"data/{number}" for number in range(300)]
    assert refused(asked(store, tmp_path, most_objects=1500))[0] == "QUOTA_EXCEEDED"


def test_a_copy_over_the_bound_is_refused_with_both_sizes(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a", b"x" * 3000)
    reason, message = refused(asked(store, tmp_path, most_bytes=2000))
    assert reason == "QUOTA_EXCEEDED" and "3,000 bytes in 1 objects" in message and "--object-cache-bytes" in message
    assert "data/a" not in store.requests


def test_old_copies_make_room_but_not_those_that_jobs_read(store: LoopbackS3, tmp_path: Path) -> None:
    uris = []
    for name in ("old", "kept", "new"):
        store.put(f"{name}/a", os.urandom(1000))
        uris.append(asked(store, tmp_path, f"s3://{BUCKET}/{name}", most_bytes=3000).uri)
    long_ago = time.time() - 10_000
    for path in (*(tmp_path / "copies").iterdir(), *(tmp_path / "blobs").iterdir()):
        os.utime(path, (long_ago, long_ago))
    store.put("more/a", os.urandom(1500))
    both = {"most_bytes": 3000, "kept": uris[:2]}
    reason, message = refused(asked(store, tmp_path, f"s3://{BUCKET}/more", **both))
    assert reason == "QUOTA_EXCEEDED" and "copies that jobs still read" in message
    assert all((tmp_path / copy_of(parse(uri))).exists() for uri in uris[:2])
    assert not (tmp_path / copy_of(parse(uris[2]))).exists()


def test_a_full_disk_says_so(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a", b"x" * 1000)
    store.said_bytes["data/a"] = 2**50
    reason, message = refused(asked(store, tmp_path, most_bytes=2**60))
    assert reason == "STORAGE_FULL" and "free space" in message and f"{2**50:,}" in message


@pytest.mark.parametrize(
    ("status", "code", "reason", "words"),
    [
        (403, "AccessDenied", "OBJECT_STORE_REFUSED", "AccessDenied"),
        (403, "SignatureDoesNotMatch", "OBJECT_STORE_REFUSED", "SignatureDoesNotMatch"),
        (400, "ExpiredToken", "OBJECT_STORE_REFUSED", "ExpiredToken"),
        (403, "InvalidObjectState", "OBJECT_STORE_REFUSED", "archived"),
        (400, "AuthorizationHeaderMalformed", "OBJECT_STORE_REFUSED", "--s3-region"),
        (404, "NoSuchBucket", "OBJECT_NOT_FOUND", "no such bucket"),
    ],
)
def test_an_error_of_the_store_is_repeated_by_its_code_alone(
    store: LoopbackS3, tmp_path: Path, *, status: int, code: str, reason: str, words: str
) -> None:
    store.put("data/a", "x")
    store.errors["list"] = [(status, code)] * 20
    found, message = refused(asked(store, tmp_path, secret="lake"))
    assert found == reason and words in message
    # The store's own text repeats the signature.
    assert "Credential" not in message and "AKID" not in message and "lake" in message


def test_an_object_that_may_not_be_read_is_not_said_to_be_unreachable(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a", "x")
    store.errors["data/a"] = [(403, "AccessDenied")] * 20
    reason, message = refused(asked(store, tmp_path))
    assert reason == "OBJECT_STORE_REFUSED" and "AccessDenied" in message


def test_a_store_that_is_busy_for_a_moment_is_asked_again(store: LoopbackS3, tmp_path: Path) -> None:
    store.put("data/a", "x")
    store.errors["list"] = [(503, "SlowDown")]
    store.errors["data/a"] = [(500, "InternalError")]
    assert copied(asked(store, tmp_path), tmp_path) == {"a": b"x"}


def test_a_store_that_is_not_there_is_said_to_be_unreachable(store: LoopbackS3, tmp_path: Path) -> None:
    reason, message = refused(asked(store, tmp_path, endpoint=f"http://127.0.0.1:{free_port()}"))
    assert reason == "OBJECT_STORE_UNREACHABLE" and "cannot be reached" in message


def test_only_the_keys_of_the_secret_are_used(
    store: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OF-THE-ACCOUNT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-account")
    store.put("data/a", "x")
    asked(store, tmp_path)
    assert store.key_ids == {""}
    store.secret_key_id = "AKID"
    store.put("data/b", "x")
    assert copied(asked(store, tmp_path, secret="lake"), tmp_path).keys() == {"a", "b"}
    assert refused(asked(store, tmp_path))[0] == "OBJECT_STORE_REFUSED"
