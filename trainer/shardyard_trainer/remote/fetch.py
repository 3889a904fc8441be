"""Copies what a spec names elsewhere, in a process that does nothing else and alone knows the secret's value."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from shardyard.remote_uris import parse, secret_name
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import check_storage
from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.failures import FULL, RunFailed
from shardyard_trainer.models.hub import resolve_hub
from shardyard_trainer.remote.copies import Copies, object_name
from shardyard_trainer.remote.download import Download, OutOfTime
from shardyard_trainer.remote.faults import UNREACHABLE, ObjectChanged, in_words
from shardyard_trainer.remote.listing import MOST_OBJECTS, Listing, list_objects
from shardyard_trainer.remote.secrets import Keys, keys_of, token_of
from shardyard_trainer.remote.store import Object, Store, session
from shardyard_trainer.remote.workers import all_of

Secrets = Mapping[str, str | None]

_NONE: Secrets = MappingProxyType({})
_AT_ONCE = 8
_LEFT_FREE_BYTES = 1024**3


def fetch(request: bytes, *, secrets: Secrets = _NONE) -> bytes:
    """Copies the objects of a URI, or a part of them: FetchRequest → FetchResult."""
    call = worker_pb2.FetchRequest.FromString(request)
    try:
        check_storage(worker_pb2.Locations(claim=call.claim) if call.HasField("claim") else worker_pb2.Locations())
        keys = keys_of(call.secret, secrets, field=call.field) if call.secret else None
        result = asyncio.run(_Fetch(call, keys).run())
    except SpecError as error:
        result = worker_pb2.FetchResult(violations=_violations(error))
    except RunFailed as failed:
        text = f"{failed.message}; {failed.next_step}"
        result = worker_pb2.FetchResult(violations=_violations(SpecError(call.field, failed.cause, text)))
    return result.SerializeToString()


def fetch_hub(request: bytes, *, secrets: Secrets) -> bytes:
    """Fetches a model of the Hub with a token: FetchHubRequest → FetchHubResult."""
    call = worker_pb2.FetchHubRequest.FromString(request)
    try:
        check_storage(worker_pb2.Locations(claim=call.claim) if call.HasField("claim") else worker_pb2.Locations())
        token = token_of(secret_name(call.hub.token), secrets, field=f"{call.field}.token")
        found = resolve_hub(call.hub, Path(call.cache_dir), field=call.field, token=token)
        call.hub.revision = found.commit
        result = worker_pb2.FetchHubResult(hub=call.hub)
    except SpecError as error:
        result = worker_pb2.FetchHubResult(violations=_violations(error))
    except RunFailed as failed:
        text = f"{failed.message}; {failed.next_step}"
        result = worker_pb2.FetchHubResult(violations=_violations(SpecError(call.field, failed.cause, text)))
    return result.SerializeToString()


class _Fetch:
    """One call: it ends when its time is over, and the next one continues from there."""

    def __init__(self, call: worker_pb2.FetchRequest, keys: Keys | None) -> None:
        self._call = call
        self._keys = keys
        self._uri = parse(call.uri)
        self._until_s = time.monotonic() + call.budget_s
        self._copies = Copies(Path(call.objects_dir))

    async def run(self) -> worker_pb2.FetchResult:
        """Raises SpecError."""
        what = f"`{shorten(self._uri.address)}`"
        if self._uri.digest and self._copies.has(self._uri):
            return worker_pb2.FetchResult(uri=str(self._uri))
        try:
            async with session(endpoint=self._call.endpoint, region=self._call.region, keys=self._keys) as store:
                return await self._from(store)
        except (SpecError, MemoryError):
            raise
        except ObjectChanged as changed:
            # A later call lists the objects again.
            text = f"{what}: the object {shorten(str(changed))!r} is being replaced; try again when that is done"
            raise SpecError(self._call.field, UNREACHABLE, text) from None
        except Exception as error:  # edge: what aiobotocore and aiohttp raise is not one family.
            if isinstance(error, OSError) and error.errno in FULL:
                raise self._full(0, 0) from None
            if isinstance(error, OSError) and error.filename:  # This disk's, not the object store's.
                raise
            raise in_words(error, what, field=self._call.field, secret=self._call.secret) from None

    async def _from(self, store: Store) -> worker_pb2.FetchResult:
        most = self._call.most_objects or MOST_OBJECTS
        listing = await list_objects(store, self._uri, most=most, field=self._call.field)
        if self._uri.digest and listing.uri != self._uri._replace(key=listing.uri.key):
            text = (
                f"`{shorten(self._uri.address)}` has other objects than those of its digest, and their copy is not "
                "here any more; leave `@sha256:…` out to train on the objects as they are"
            )
            raise SpecError(self._call.field, "DATA_CHANGED", text)
        if self._copies.has(listing.uri):
            return worker_pb2.FetchResult(
                uri=str(listing.uri), done_bytes=listing.num_bytes, all_bytes=listing.num_bytes
            )
        names = {
            name: object_name(self._call.endpoint, self._uri.bucket, each) for name, each in listing.objects.items()
        }
        here = {name: self._copies.blob(names[name], each) for name, each in listing.objects.items()}
        self._make_room(listing, sum(each.size for name, each in listing.objects.items() if here[name] is None))
        await self._fetch_missing(store, listing, names, here)
        found = {name: self._copies.blob(names[name], each) for name, each in listing.objects.items()}
        done = sum(listing.objects[name].size for name, blob in found.items() if blob is not None)
        result = worker_pb2.FetchResult(done_bytes=done, all_bytes=listing.num_bytes)
        whole = {name: blob for name, blob in found.items() if blob is not None}
        if len(whole) == len(found):
            self._copies.put_together(listing.uri, whole)
            result.uri = str(listing.uri)
        return result

    async def _fetch_missing(
        self, store: Store, listing: Listing, names: Mapping[str, str], here: Mapping[str, Path | None]
    ) -> None:
        waiting = [(names[name], each) for name, each in listing.objects.items() if here[name] is None]
        waiting.reverse()

        async def work() -> None:
            while waiting:
                await self._fetch_one(store, *waiting.pop())
                if self._is_over():  # Asked afterwards: each call comes forward, however slow the list was.
                    return

        await all_of(work, min(_AT_ONCE, len(waiting)))

    async def _fetch_one(self, store: Store, name: str, wanted: Object) -> None:
        try:
            download = Download(self._copies.blobs, name, self._uri.bucket, wanted, field=self._call.field)
            await download.fetch(store, self._is_over, lambda part, digest: self._copies.keep(name, part, digest))
        except OutOfTime:
            return

    def _is_over(self) -> bool:
        return time.monotonic() > self._until_s

    def _make_room(self, listing: Listing, need: int) -> None:
        """Raises SpecError QUOTA_EXCEEDED or STORAGE_FULL unless the missing bytes have room, after old copies went."""
        most = self._call.most_bytes
        if listing.num_bytes > most:
            text = (
                f"`{shorten(self._uri.address)}` has {listing.num_bytes:,} bytes in {len(listing.objects):,} objects, "
                f"but all copies may take {most:,}; name fewer, or ask the operator to raise --object-cache-bytes"
            )
            metadata = {"need_bytes": str(listing.num_bytes), "most_bytes": str(most)}
            raise SpecError(self._call.field, "QUOTA_EXCEEDED", text, metadata)
        over = self._copies.used_bytes() + need - most
        short = need + _LEFT_FREE_BYTES - shutil.disk_usage(self._copies.blobs).free
        if max(over, short) <= 0:
            return
        kept = [*map(parse, self._call.kept), listing.uri]
        gone = self._copies.make_room(max(over, short), kept=kept)
        if need and short - gone > 0:
            raise self._full(need, shutil.disk_usage(self._copies.blobs).free)
        if need and over - gone > 0:
            text = (
                f"`{shorten(self._uri.address)}` needs {need:,} bytes more, but copies that jobs still read fill the "
                f"{most:,} bytes for them; wait for the jobs, or ask the operator to raise --object-cache-bytes"
            )
            raise SpecError(self._call.field, "QUOTA_EXCEEDED", text, {"need_bytes": str(need)})

    def _full(self, need: int, free: int) -> SpecError:
        more = f" needs {need:,} bytes, but there are {max(free - _LEFT_FREE_BYTES, 0):,}" if need else ""
        text = f"the storage has no room for the copy of `{shorten(self._uri.address)}`{':' if more else ''}{more}"
        return SpecError(self._call.field, "STORAGE_FULL", f"{text}; free space there, or name fewer objects")


def _violations(error: SpecError) -> list[worker_pb2.Violation]:
    return [
        worker_pb2.Violation(field=each.field, reason=each.reason, message=each.message, metadata=each.metadata)
        for each in error.all()
    ]
