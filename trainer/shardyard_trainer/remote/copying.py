"""Copies a model to an object store, in a process that does nothing else and alone knows the secret's value."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shardyard.export_formats import prefix_of, word_of, words
from shardyard.remote_uris import ObjectUri, parse
from shardyard.v1 import spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import check_storage
from shardyard_trainer.data.errors import SpecError, listed, shorten
from shardyard_trainer.failures import FULL, RunFailed
from shardyard_trainer.remote.download import OutOfTime
from shardyard_trainer.remote.faults import EXISTS, UNREACHABLE, ObjectChanged, in_words
from shardyard_trainer.remote.listing import check_names
from shardyard_trainer.remote.notes import Notes, open_notes
from shardyard_trainer.remote.secrets import Keys, keys_of
from shardyard_trainer.remote.sending import PART_BYTES, LocalFile, Sending
from shardyard_trainer.remote.store import Object, Store, session
from shardyard_trainer.remote.workers import all_of

MANIFEST = "shardyard-manifest.json"
MOST_FILES = 10_000
MOST_BYTES = 2**40

_FILES_AT_ONCE = 2
_MOST_KEY_BYTES = 1024
_MOST_PARENTS = 32
# Without it nobody takes a folder for a model.
_LAST = "config.json"


class Chosen(NamedTuple):
    """The files of a model that are copied: their names at the address, and what they were registered as."""

    files: Mapping[str, transfer_pb2.StoredFile]

    @property
    def num_bytes(self) -> int:
        """The size of all files together."""
        return sum(each.size_bytes for each in self.files.values())


def choose(
    files: Iterable[transfer_pb2.StoredFile],
    number: spec_pb2.ExportFormat.ValueType,
    uri: ObjectUri,
    *,
    field: str,
) -> Chosen:
    """The files of a further format, or the model's own, that are to be copied below an address.

    Raises SpecError: SPEC_INVALID for a format that the model does not have, QUOTA_EXCEEDED, DATA_INVALID for names.
    """
    files = list(files)
    prefix = prefix_of(number) if number else ""
    others = tuple(prefix_of(each) for each in spec_pb2.ExportFormat.values() if each and each != number)
    found = {
        each.path.removeprefix(prefix): each
        for each in sorted(files, key=lambda each: each.path)
        if each.path.startswith(prefix) and (prefix or not each.path.startswith(others))
    }
    found.pop(MANIFEST, None)  # Of a copy that this model was read from.
    if not found:
        known = [word for word in words() if any(each.path.startswith(f"exports/{word}/") for each in files)]
        text = f"the model is not there as {word_of(number)}; it has {listed(known) if known else 'no further format'}"
        raise SpecError(f"{field}.format", "SPEC_INVALID", f"{text}; export it first (ExportModel), or leave it out")
    chosen = Chosen(found)
    if len(found) > MOST_FILES or chosen.num_bytes > MOST_BYTES:
        text = (
            f"{len(found):,} files with {chosen.num_bytes:,} bytes; at most {MOST_FILES:,} files and {MOST_BYTES:,} "
            "bytes are copied; download the model, and copy it with a tool of the object store"
        )
        raise SpecError(f"{field}.uri", "QUOTA_EXCEEDED", text)
    check_names([*found, MANIFEST], uri, field=f"{field}.uri")
    longest = max((*found, MANIFEST), key=lambda name: len(name.encode()))
    if len(key_of(uri, longest).encode()) > _MOST_KEY_BYTES:
        text = f"with {shorten(longest)!r} below it a key takes more than {_MOST_KEY_BYTES:,} bytes; shorten the prefix"
        raise SpecError(f"{field}.uri", "DATA_INVALID", text)
    return chosen


def key_of(uri: ObjectUri, name: str) -> str:
    """The key of a file's object."""
    return f"{_below(uri)}{name}"


def copy(request: bytes, *, secrets: Mapping[str, str | None]) -> bytes:
    """Copies a model's files to an address, or a part of them: CopyRequest → CopyResult."""
    call = worker_pb2.CopyRequest.FromString(request)
    try:
        check_storage(worker_pb2.Locations(claim=call.claim) if call.HasField("claim") else worker_pb2.Locations())
        keys = keys_of(call.secret, secrets, field=call.field)
        result = asyncio.run(_Copy(call, keys).run())
    except SpecError as error:
        result = worker_pb2.CopyResult(violations=_violations(error))
    except RunFailed as failed:
        text = f"{failed.message}; {failed.next_step}"
        result = worker_pb2.CopyResult(violations=_violations(SpecError(call.field, failed.cause, text)))
    return result.SerializeToString()


class _Copy:
    """One call: it ends when its time is over, and the next one continues from there."""

    def __init__(self, call: worker_pb2.CopyRequest, keys: Keys) -> None:
        self._call = call
        self._keys = keys
        self._uri = parse(call.uri)
        self._until_s = time.monotonic() + call.budget_s
        self._chosen = choose(call.files, call.format, self._uri, field=call.field.rpartition(".")[0])
        self._files = {
            (key := key_of(self._uri, name)): LocalFile(
                Path(call.folder) / each.path, key, each.size_bytes, each.sha256, call.part_bytes or PART_BYTES
            )
            for name, each in self._chosen.files.items()
        }
        self._manifest = _manifest(call, self._chosen)
        self._manifest_key = key_of(self._uri, MANIFEST)

    async def run(self) -> worker_pb2.CopyResult:
        """Raises SpecError."""
        what = f"`{shorten(self._uri.address)}`"
        name = "\0".join((self._call.endpoint, self._uri.bucket, _below(self._uri)))
        name = hashlib.sha256(name.encode() + self._manifest).hexdigest()
        try:
            with open_notes(Path(self._call.notes_dir), name) as notes:
                if notes is None:  # The call before is being ended.
                    return self._result({})
                async with session(endpoint=self._call.endpoint, region=self._call.region, keys=self._keys) as store:
                    return await self._with(store, notes)
        except (SpecError, MemoryError):
            raise
        except ObjectChanged as changed:
            text = f"{what}: the object {shorten(str(changed))!r} is being replaced by others; try again"
            raise SpecError(self._call.field, UNREACHABLE, text) from None
        except Exception as error:  # edge: what aiobotocore and aiohttp raise is not one family.
            if isinstance(error, OSError) and error.errno in FULL:
                text = f"{what} is not copied: the storage has no room for notes on what was sent; free space there"
                raise SpecError(self._call.field, "STORAGE_FULL", text) from None
            if isinstance(error, OSError) and error.filename:  # This disk's, not the object store's.
                raise
            raise in_words(error, what, field=self._call.field, secret=self._call.secret, instead="") from None

    async def _with(self, store: Store, notes: Notes) -> worker_pb2.CopyResult:
        sending = Sending(store, self._uri.bucket, notes, field=self._call.field, is_over=self._is_over)
        if self._call.abort:
            await sending.abort()
            notes.remove()
            return self._result({})
        try:
            await self._check_place(store)
            there = await self._there(store)
            is_done = await self._compare(store, sending, there)
            if not is_done:
                is_done = await self._send(store, sending, notes, there)
        except SpecError as error:
            if error.reason != UNREACHABLE:
                await sending.abort()
            raise
        if is_done:
            notes.remove()
        return self._result(notes.etags, is_done=is_done)

    async def _check_place(self, store: Store) -> None:
        """Raises SpecError OBJECT_EXISTS if readers of the address would read something else, or others read it too."""
        folder = _below(self._uri).removesuffix("/")
        if folder and await store.look(self._uri.bucket, folder) is not None:
            raise self._exists(folder, "is an object, and the address of one cannot be that of a folder")
        parents = [folder.rsplit("/", count)[0] for count in range(1, min(folder.count("/"), _MOST_PARENTS) + 1)]
        for parent in parents:
            if await store.look(self._uri.bucket, f"{parent}/{MANIFEST}") is not None:
                raise self._exists(f"{parent}/{MANIFEST}", "is of another copy, which would get these files too")

    async def _there(self, store: Store) -> dict[str, Object]:
        """The objects below the address, all of them ours by name. Raises SpecError OBJECT_EXISTS."""
        found: dict[str, Object] = {}
        async for page in store.pages(self._uri.bucket, _below(self._uri)):
            for each in page:
                if each.key in self._files or each.key == self._manifest_key:
                    found[each.key] = each
                # Consoles make an empty object `folder/` for each folder.
                elif not (each.key.endswith("/") and each.size == 0):
                    raise self._exists(each.key, "is not a file of this model, and would be read as one")
        return found

    async def _compare(self, store: Store, sending: Sending, there: Mapping[str, Object]) -> bool:
        """Whether all is done; raises SpecError OBJECT_EXISTS before anything is written."""
        manifest = there.get(self._manifest_key)
        if manifest is not None and not await self._is_ours(store, manifest):
            raise self._exists(self._manifest_key, "is of another model, or of another state of this one")

        waiting = [file for key, file in self._files.items() if key in there]

        async def work() -> None:
            while waiting:
                file = waiting.pop()
                await sending.compare(file, there[file.key])

        await all_of(work, min(_FILES_AT_ONCE, len(waiting)))
        return manifest is not None and there.keys() >= self._files.keys()

    async def _is_ours(self, store: Store, found: Object) -> bool:
        if found.size != len(self._manifest):
            return False
        async with store.read(self._uri.bucket, found, 0) as (_, stream, _):
            return bool(await stream.read() == self._manifest)

    async def _send(self, store: Store, sending: Sending, notes: Notes, there: Mapping[str, Object]) -> bool:
        """Sends what is missing, `config.json` and the manifest last; whether all is done."""
        missing = [file for key, file in self._files.items() if key not in there]
        last = [file for file in missing if file.key == key_of(self._uri, _LAST)]
        waiting = sorted((file for file in missing if file not in last), key=lambda file: file.size)
        if not await self._send_all(sending, waiting) or not await self._send_all(sending, last):
            return False
        now = await self._there(store)
        for key, file in self._files.items():
            if key not in now or (now[key].size, now[key].etag) != (file.size, notes.etags.get(key)):
                raise self._exists(key, "was changed or removed by others while the model was being copied")
        await sending.send_bytes(self._manifest_key, self._manifest)
        return True

    async def _send_all(self, sending: Sending, waiting: list[LocalFile]) -> bool:
        """The largest first; whether all were sent before the time was over."""
        left = list(waiting)
        is_late = False

        async def work() -> None:
            nonlocal is_late
            while left and not is_late:
                try:
                    await sending.send(left.pop())
                except OutOfTime:
                    is_late = True
                is_late = is_late or (self._is_over() and bool(left))

        await all_of(work, min(_FILES_AT_ONCE, len(left)))
        return not is_late

    def _is_over(self) -> bool:
        return time.monotonic() > self._until_s

    def _exists(self, key: str, why: str) -> SpecError:
        text = (
            f"`s3://{self._uri.bucket}/{shorten(key)}` {why}; choose another address, or remove it in the object store"
        )
        return SpecError(self._call.field, EXISTS, text, {"object": key})

    def _result(self, etags: Mapping[str, str], *, is_done: bool = False) -> worker_pb2.CopyResult:
        every = self._chosen.num_bytes
        sent = sum(file.size for key, file in self._files.items() if key in etags)
        return worker_pb2.CopyResult(
            is_done=is_done, done_bytes=every if is_done else sent, all_bytes=every, num_files=len(self._files)
        )


def _manifest(call: worker_pb2.CopyRequest, chosen: Chosen) -> bytes:
    """The manifest: the same bytes for the same files of the same model."""
    files: Sequence[Mapping[str, object]] = [
        {"path": name, "size_bytes": each.size_bytes, "sha256": each.sha256} for name, each in chosen.files.items()
    ]
    form = word_of(call.format) if call.format else ""
    return (json.dumps({"version": 1, "model": call.model, "format": form, "files": files}, indent=1) + "\n").encode()


def _below(uri: ObjectUri) -> str:
    """What all keys of the copy begin with; empty for a whole bucket."""
    return uri.key if uri.is_prefix else f"{uri.key}/"


def _violations(error: SpecError) -> list[worker_pb2.Violation]:
    return [
        worker_pb2.Violation(field=each.field, reason=each.reason, message=each.message, metadata=each.metadata)
        for each in error.all()
    ]
