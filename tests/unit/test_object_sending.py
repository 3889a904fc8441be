"""A model becomes objects: whole or not at all, never in place of others, against stores that fail and that differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.loopback_s3 import BUCKET, LoopbackS3, loopback_s3
from shardyard.v1 import spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.remote import sending
from shardyard_trainer.remote.copying import MANIFEST, copy

SMALL = 100_000
KEYS = {"lake": "aws_access_key_id = id\naws_secret_access_key = key\n"}
TO = f"s3://{BUCKET}/models/mine"
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 2000,
    "tokenizer/vocab.txt": b"a\nb\n",
    "empty.txt": b"",
    "exports/onnx/model.onnx": b"onnx",
    "exports/onnx/config.json": b"{1}",
}
OWN = {name: data for name, data in FILES.items() if not name.startswith("exports/")}


@pytest.fixture
def store() -> Iterator[LoopbackS3]:
    with loopback_s3() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


def call(store: LoopbackS3, folder: Path, to: str = TO, **changes: Any) -> worker_pb2.CopyResult:
    files = [
        transfer_pb2.StoredFile(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in FILES.items()
    ]
    request = worker_pb2.CopyRequest(
        field="spec.model_copy.uri",
        uri=to,
        folder=str(folder),
        files=files,
        model="projects/p/models/mine",
        notes_dir=str(folder.parent / "notes"),
        endpoint=store.endpoint,
        secret="lake",
        **{"budget_s": 60.0, **changes},
    )
    return worker_pb2.CopyResult.FromString(copy(request.SerializeToString(), secrets=KEYS))


def refusal(result: worker_pb2.CopyResult) -> worker_pb2.Violation:
    (violation,) = result.violations
    assert violation.field == "spec.model_copy.uri" and not result.is_done
    return violation


def there(store: LoopbackS3, below: str = "models/mine/") -> dict[str, bytes]:
    return {key.removeprefix(below): each.data for key, each in store.objects.items() if key.startswith(below)}


def writes(store: LoopbackS3) -> list[str]:
    return [each for each in store.requests if each.split()[0] in ("put", "part", "complete")]


def test_the_files_become_objects_with_the_config_and_the_manifest_last(store: LoopbackS3, folder: Path) -> None:
    result = call(store, folder)
    assert result.is_done and result.done_bytes == result.all_bytes == sum(map(len, OWN.values()))
    found = there(store)
    manifest = json.loads(found.pop(MANIFEST))
    assert found == OWN
    assert [each["path"] for each in manifest["files"]] == sorted(OWN)
    assert writes(store)[-2:] == ["put models/mine/config.json", f"put models/mine/{MANIFEST}"]
    assert store.key_ids == {"id"}
    assert not list((folder.parent / "notes").glob("*.json"))


def test_again_it_finds_itself_done_and_writes_nothing(store: LoopbackS3, folder: Path) -> None:
    assert call(store, folder).is_done
    store.requests.clear()
    assert call(store, folder).is_done and not writes(store)
    # Also if the address is written with a slash.
    assert call(store, folder, f"{TO}/").is_done and not writes(store)


def test_requests_have_nothing_that_only_amazon_knows(store: LoopbackS3, folder: Path) -> None:
    """Stores took the checksums that newer clients add for bytes of the file, or refused them (boto3#4398, #4435)."""
    assert call(store, folder).is_done
    assert len(store.headers_of_puts) == len(OWN) + 1
    for headers in store.headers_of_puts:
        assert "content-md5" in headers and headers["content-length"].isdigit()
        assert "aws-chunked" not in headers.get("content-encoding", "") and "transfer-encoding" not in headers
        assert not [
            name for name in headers if name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer"))
        ]


@pytest.mark.parametrize("size", [0, 1, sending.PART_BYTES + 1, 70 * 2**30, 2**40, 5 * 2**40])
def test_a_file_of_any_size_has_as_many_parts_as_s3_takes(size: int) -> None:
    file = sending.LocalFile(Path("x"), "x", size, "")
    assert 5 * 2**20 <= file.part_bytes <= 2**30 and -(-size // file.part_bytes) <= 10_000


def test_a_format_is_copied_alone_as_a_folder_of_its_own(store: LoopbackS3, folder: Path) -> None:
    assert call(store, folder, format=spec_pb2.EXPORT_FORMAT_ONNX).is_done
    assert set(there(store)) == {"model.onnx", "config.json", MANIFEST}
    (violation,) = call(store, folder, f"{TO}8", format=spec_pb2.EXPORT_FORMAT_ONNX_INT8).violations
    assert violation.field == "spec.model_copy.format" and "it has onnx" in violation.message


@pytest.mark.parametrize(
    ("key", "data", "words"),
    [
        ("models/mine/model.safetensors", b"others", "other bytes"),
        ("models/mine/pytorch_model.bin", b"others", "not a file of this model"),
        ("models/mine", b"others", "address of one cannot be that of a folder"),
        (f"models/mine/{MANIFEST}", b"{}", "of another model"),
        (f"models/{MANIFEST}", b"{}", "of another copy"),
        (f"models/mine/deeper/{MANIFEST}", b"{}", "not a file of this model"),
    ],
)
def test_what_others_have_there_is_never_replaced(
    store: LoopbackS3, folder: Path, key: str, data: bytes, words: str
) -> None:
    store.put(key, data)
    violation = refusal(call(store, folder))
    assert (
        violation.reason == "OBJECT_EXISTS"
        and words in violation.message
        and f"`s3://{BUCKET}/{key}`" in violation.message
    )
    assert not writes(store) and {name: each.data for name, each in store.objects.items()} == {key: data}


def test_objects_that_have_the_bytes_already_are_taken_for_what_they_are(store: LoopbackS3, folder: Path) -> None:
    store.put("models/mine/model.safetensors", OWN["model.safetensors"])
    # Encrypted by KMS, or sent in other parts, an object has another ETag: it is read.
    store.put("models/mine/config.json", OWN["config.json"], "0123456789abcdef0123456789abcdef-7")
    store.put("models/mine/", b"")  # As consoles make them.
    assert call(store, folder).is_done
    assert [each for each in writes(store) if "config" in each or "safetensors" in each] == []


def test_who_writes_meanwhile_is_not_replaced(store: LoopbackS3, folder: Path) -> None:
    """The other one comes after the look, so that only the condition of the request keeps from replacing it."""
    listing = store.objects

    class Late(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            if key == "models/mine/config.json" and f"put {key}" in store.requests:
                store.objects = listing
                store.put("models/mine/config.json", b"theirs")
                return True
            return super().__contains__(key)

    store.objects = Late()
    listing = dict(store.objects)
    violation = refusal(call(store, folder))
    assert violation.reason == "OBJECT_EXISTS" and store.objects["models/mine/config.json"].data == b"theirs"


def test_an_answer_that_was_lost_is_not_taken_for_somebody_elses_object(store: LoopbackS3, folder: Path) -> None:
    store.loses_answers = {f"models/mine/{name}" for name in (*OWN, MANIFEST)}
    assert call(store, folder).is_done
    assert set(there(store)) == {*OWN, MANIFEST}


def test_a_store_that_does_not_offer_conditions_is_written_after_a_look(store: LoopbackS3, folder: Path) -> None:
    store.knows_conditions = False
    assert call(store, folder).is_done and set(there(store)) == {*OWN, MANIFEST}
    store.put("models/mine/config.json", b"theirs")
    assert refusal(call(store, folder)).reason == "OBJECT_EXISTS"


def test_a_large_file_goes_in_parts_and_continues_where_it_ended(store: LoopbackS3, folder: Path) -> None:
    result = call(store, folder, part_bytes=SMALL, budget_s=0.0)
    calls = 1
    while not result.is_done:
        assert not result.violations and MANIFEST not in there(store)
        result = call(store, folder, part_bytes=SMALL, budget_s=0.0)
        calls += 1
    assert calls >= 2 and there(store)["model.safetensors"] == OWN["model.safetensors"]
    parts = [each for each in writes(store) if each.startswith("part")]
    assert len(parts) == len(set(parts)) == 6 and not store.uploads
    assert store.objects["models/mine/model.safetensors"].tag.endswith("-6")
    store.requests.clear()
    assert call(store, folder, part_bytes=SMALL).is_done and not writes(store)


def test_parts_that_the_store_has_removed_are_sent_again(store: LoopbackS3, folder: Path) -> None:
    assert not call(store, folder, part_bytes=SMALL, budget_s=0.0).is_done
    assert store.uploads
    store.uploads.clear()
    assert (
        call(store, folder, part_bytes=SMALL).is_done and there(store)["model.safetensors"] == OWN["model.safetensors"]
    )


def test_parts_that_the_store_does_not_put_together_because_of_others_are_sent_afresh(
    store: LoopbackS3, folder: Path
) -> None:
    store.errors["complete models/mine/model.safetensors"] = [(409, "ConditionalRequestConflict")]
    assert refusal(call(store, folder, part_bytes=SMALL)).reason == "OBJECT_STORE_UNREACHABLE"
    assert not store.uploads
    assert (
        call(store, folder, part_bytes=SMALL).is_done and there(store)["model.safetensors"] == OWN["model.safetensors"]
    )


@pytest.mark.parametrize("refuses", [True, False])
def test_parts_do_not_stay_after_a_refusal_nor_after_an_end(store: LoopbackS3, folder: Path, refuses: bool) -> None:
    assert not call(store, folder, part_bytes=SMALL, budget_s=0.0).is_done
    assert store.uploads
    if refuses:
        store.put("models/mine/others.txt", b"")
        assert refusal(call(store, folder, part_bytes=SMALL)).reason == "OBJECT_EXISTS"
    else:
        assert not call(store, folder, part_bytes=SMALL, abort=True).violations
    assert not store.uploads
    assert not any(json.loads(path.read_text())["large"] for path in (folder.parent / "notes").glob("*.json"))


def test_a_store_that_fails_for_a_while_keeps_what_was_sent(store: LoopbackS3, folder: Path) -> None:
    store.errors["complete models/mine/model.safetensors"] = [(500, "InternalError")] * 100
    violation = refusal(call(store, folder, part_bytes=SMALL))
    assert violation.reason == "OBJECT_STORE_UNREACHABLE" and "InternalError" in violation.message
    store.errors.clear()
    store.requests.clear()
    assert call(store, folder, part_bytes=SMALL).is_done
    assert not [each for each in writes(store) if each.startswith("part")]


@pytest.mark.parametrize(
    ("what", "answer", "reason", "words"),
    [
        ("put models/mine/config.json", (403, "AccessDenied"), "OBJECT_STORE_REFUSED", "secret lake"),
        ("put models/mine/model.safetensors", (403, "AccessDenied"), "OBJECT_STORE_REFUSED", "AccessDenied"),
        ("put models/mine/config.json", (400, "InvalidRequest"), "OBJECT_STORE_REFUSED", "InvalidRequest"),
        ("put models/mine/config.json", (507, "XMinioStorageFull"), "OBJECT_STORE_REFUSED", "XMinioStorageFull"),
        ("list", (404, "NoSuchBucket"), "OBJECT_NOT_FOUND", "no such bucket"),
        ("list", (403, "ExpiredToken"), "OBJECT_STORE_REFUSED", "ExpiredToken"),
        ("list", (301, "PermanentRedirect"), "OBJECT_STORE_REFUSED", "--s3-region"),
    ],
)
def test_what_the_store_says_is_told_without_its_words(
    store: LoopbackS3, folder: Path, what: str, answer: tuple[int, str], *, reason: str, words: str
) -> None:
    store.errors[what] = [answer] * 50
    violation = refusal(call(store, folder))
    assert violation.reason == reason and words in violation.message, violation
    assert "Signature" not in violation.message and "upload the files" not in violation.message
    assert MANIFEST not in there(store)


def test_a_store_that_says_other_bytes_than_were_sent_is_not_believed(store: LoopbackS3, folder: Path) -> None:
    store.says_etag = "0" * 32
    violation = refusal(call(store, folder))
    assert violation.reason == "OBJECT_STORE_UNREACHABLE" and "other bytes than were sent" in violation.message
    # Not an MD5, as with keys of KMS: the store's own comparison with Content-MD5 counts.
    store.objects.clear()
    store.says_etag = "not-an-md5"
    assert call(store, folder).is_done


@pytest.mark.parametrize("part_bytes", [0, 100_000])
def test_a_file_that_is_not_what_was_registered_is_never_sent(store: LoopbackS3, folder: Path, part_bytes: int) -> None:
    (folder / "model.safetensors").write_bytes(OWN["model.safetensors"][:-1] + b"!")
    violation = refusal(call(store, folder, part_bytes=part_bytes))
    assert violation.reason == "MODEL_CHANGED" and "model.safetensors" in violation.message
    assert "model.safetensors" not in there(store) and "config.json" not in there(store)


def test_a_link_in_place_of_a_file_is_not_followed(store: LoopbackS3, folder: Path) -> None:
    (folder / "empty.txt").unlink()
    (folder / "empty.txt").symlink_to("/etc/hostname")
    assert refusal(call(store, folder)).reason == "MODEL_CHANGED"


def test_a_manifest_of_an_earlier_copy_is_not_part_of_the_model(
    store: LoopbackS3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, MANIFEST, b"of elsewhere")
    (folder / MANIFEST).write_bytes(b"of elsewhere")
    assert call(store, folder).is_done
    assert json.loads(there(store)[MANIFEST])["model"] == "projects/p/models/mine"


@pytest.mark.parametrize("name", ["a/../b", "A.txt", "x" * 1020])
def test_names_that_could_not_be_read_from_there_are_refused(
    store: LoopbackS3, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, name, b"")
    monkeypatch.setitem(FILES, "a.txt", b"")
    assert refusal(call(store, folder)).reason == "DATA_INVALID" and not store.requests
