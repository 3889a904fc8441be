"""An S3 store on the loopback interface that fails on request: as much of its HTTP as a copy asks for.

moto is the real one (`test_objects_served.py`); this one breaks off, lies and changes its objects.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "lake"


@dataclass
class Stored:
    """The bytes of an object; the ETag is their MD5 unless another one is given."""

    data: bytes
    etag: str = ""

    @property
    def tag(self) -> str:
        """The ETag without quotes."""
        return self.etag or hashlib.md5(self.data, usedforsecurity=False).hexdigest()


class LoopbackS3(http.server.ThreadingHTTPServer):
    """One bucket, `lake`; counts what it is asked, and keeps who signed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Stored] = {}
        self.requests: list[str] = []
        self.key_ids: set[str] = set()
        self.secret_key_id = ""
        """Only requests of this key are answered; empty: all are."""
        self.broken_off: dict[str, list[int]] = {}
        """By key: after how many bytes the next answers end."""
        self.errors: dict[str, list[tuple[int, str]]] = {}
        """By method, or key: statuses and codes of the next answers."""
        self.slow_s = 0.0
        """Between two parts of an object."""
        self.said_bytes: dict[str, int] = {}
        """Sizes that it lists for objects, other than their own."""
        self.also_listed: list[str] = []
        self.endless = False
        self.uploads: dict[str, dict[int, bytes]] = {}
        """By the upload's id: the parts of objects that are not put together."""
        self.knows_conditions = True
        """Whether it follows If-None-Match; else it says that it does not offer it."""
        self.loses_answers: set[str] = set()
        """Keys whose next PUT is carried out, and answered with an error."""
        self.headers_of_puts: list[dict[str, str]] = []
        self.says_etag = ""
        """The ETag that it gives to what is written, instead of the MD5."""

    def put(self, key: str, data: bytes | str, etag: str = "") -> None:
        """Stores an object."""
        self.objects[key] = Stored(data.encode() if isinstance(data, str) else data, etag)

    @property
    def endpoint(self) -> str:
        """What `--s3-endpoint` is set to."""
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def loopback_s3() -> Iterator[LoopbackS3]:
    """A store that is gone at the end."""
    with LoopbackS3() as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield store
        store.shutdown()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackS3
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if self._refuses(bucket, key or "list"):
            return
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if "uploadId" in asked:
            self._list_parts(asked)
        elif not key:
            self._list(asked)
        else:
            self._send_object(key)

    def do_HEAD(self) -> None:
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        if self._refuses(bucket, f"head {key}"):
            return
        found = self.server.objects.get(key)
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{found.tag}"')
        self.send_header("Content-Length", str(len(found.data)) if found else "0")
        self.end_headers()

    def do_PUT(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        upload = asked.get("uploadId", "")
        self.server.headers_of_puts.append({name.lower(): value for name, value in self.headers.items()})
        if self._refuses(bucket, f"part {key} {asked['partNumber']}" if upload else f"put {key}"):
            return
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        if self.headers.get("Content-MD5") != md5:
            self._fail(400, "BadDigest")
        elif upload and upload not in self.server.uploads:
            self._fail(404, "NoSuchUpload")
        elif upload:
            self.server.uploads[upload][int(asked["partNumber"])] = data
            self._say_etag(hashlib.md5(data, usedforsecurity=False).hexdigest())
        elif self._may_write(key):
            self.server.put(key, data, self.server.says_etag)
            if key in self.server.loses_answers:
                self.server.loses_answers.discard(key)
                self._fail(503, "SlowDown")
            else:
                self._say_etag(self.server.objects[key].tag)

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        asked = parse_qs(parts.query, keep_blank_values=True)
        if "uploads" in asked:
            if not self._refuses(bucket, f"begin {key}"):
                upload = f"upload-{len(self.server.requests)}"
                self.server.uploads[upload] = {}
                self._send(200, f"<R><UploadId>{upload}</UploadId></R>".encode())
            return
        found = self.server.uploads.get(asked["uploadId"][0])
        if self._refuses(bucket, f"complete {key}"):
            return
        if found is None:
            self._fail(404, "NoSuchUpload")
        elif self._may_write(key):
            md5s = [hashlib.md5(found[number], usedforsecurity=False).digest() for number in sorted(found)]
            etag = f"{hashlib.md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-{len(md5s)}"
            self.server.put(key, b"".join(found[number] for number in sorted(found)), etag)
            del self.server.uploads[asked["uploadId"][0]]
            self._send(200, f"<R><ETag>&quot;{etag}&quot;</ETag></R>".encode())

    def do_DELETE(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if not self._refuses(bucket, f"abort {key}"):
            gone = self.server.uploads.pop(parse_qs(parts.query)["uploadId"][0], None)
            self._send(204, b"") if gone is not None else self._fail(404, "NoSuchUpload")

    def _may_write(self, key: str) -> bool:
        wants_new = self.headers.get("If-None-Match") == "*"
        if wants_new and not self.server.knows_conditions:
            self._fail(501, "NotImplemented")
        elif wants_new and key in self.server.objects:
            self._fail(412, "PreconditionFailed")
        else:
            return True
        return False

    def _say_etag(self, etag: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{self.server.says_etag or etag}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list_parts(self, asked: dict[str, str]) -> None:
        found = self.server.uploads.get(asked["uploadId"])
        if found is None:
            self._fail(404, "NoSuchUpload")
            return
        entries = [
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(data)}</Size>"
            f"<ETag>&quot;{hashlib.md5(data, usedforsecurity=False).hexdigest()}&quot;</ETag></Part>"
            for number, data in sorted(found.items())
        ]
        self._send(200, f"<R><IsTruncated>false</IsTruncated>{''.join(entries)}</R>".encode())

    def _refuses(self, bucket: str, what: str) -> bool:
        self.server.requests.append(what)
        signed = self.headers.get("Authorization", "")
        key_id = signed.partition("Credential=")[2].partition("/")[0]
        self.server.key_ids.add(key_id)
        if self.server.errors.get(what):
            self._fail(*self.server.errors[what].pop(0))
        elif self.server.secret_key_id and key_id != self.server.secret_key_id:
            self._fail(403, "AccessDenied")
        elif bucket != BUCKET:
            self._fail(404, "NoSuchBucket")
        else:
            return False
        return True

    def _fail(self, status: int, code: str) -> None:
        said = f"<Error><Code>{code}</Code><Message>{self.headers.get('Authorization', '')}</Message></Error>"
        self._send(status, b"" if self.command == "HEAD" else said.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _list(self, asked: dict[str, str]) -> None:
        prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        page = keys[: int(asked.get("max-keys", "1000"))]
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Size>{self._size(key)}</Size>"
            f"<ETag>&quot;{self.server.objects[key].tag}&quot;</ETag></Contents>"
            for key in page
        ]
        entries += [
            f"<Contents><Key>{escape(key)}</Key><Size>1</Size><ETag>&quot;x&quot;</ETag></Contents>"
            for key in self.server.also_listed
        ]
        more = self.server.endless or len(keys) > len(page)
        token = (
            f"<NextContinuationToken>{escape(page[-1] if page else 'again')}</NextContinuationToken>" if more else ""
        )
        body = (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{''.join(entries)}{token}"
            "</ListBucketResult>"
        )
        self._send(200, body.encode())

    def _size(self, key: str) -> int:
        return self.server.said_bytes.get(key, len(self.server.objects[key].data))

    def _send_object(self, key: str) -> None:
        found = self.server.objects.get(key)
        if found is None:
            self._fail(404, "NoSuchKey")
            return
        if self.headers.get("If-Match", "").strip('"') not in ("", found.tag):
            self._fail(412, "PreconditionFailed")
            return
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        data = found.data[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{found.tag}"')
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(found.data) - 1}/{len(found.data)}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        ends = self.server.broken_off.get(key)
        sent = data[: ends.pop(0)] if ends else data
        for at in range(0, len(sent), 2**18):
            self.wfile.write(sent[at : at + 2**18])
            time.sleep(self.server.slow_s)
        if len(sent) < len(data):
            self.close_connection = True
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
