"""The text of `s3://` URIs and of `secret://` names, as client, service and trainer read it."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

SCHEME = "s3://"
SECRET = "secret://"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PIN = re.compile(r"@sha256:([0-9a-f]{64})\Z")
_SECRET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MOST_KEY_BYTES = 1024


class ObjectUri(NamedTuple):
    """An object, or all objects below a prefix, if `key` is empty or ends with `/`.

    `digest` pins them by their names, sizes and ETags; empty: as they are now.
    """

    bucket: str
    key: str
    digest: str = ""

    @property
    def is_prefix(self) -> bool:
        """Whether it names all objects below the key; else it may still do so."""
        return not self.key or self.key.endswith("/")

    @property
    def address(self) -> str:
        """The URI without the digest."""
        return f"{SCHEME}{self.bucket}/{self.key}"

    def __str__(self) -> str:
        """The URI."""
        return f"{self.address}@sha256:{self.digest}" if self.digest else self.address


def is_remote(uri: str) -> bool:
    """Whether it names objects, rightly or wrongly."""
    return uri.lower().startswith((SCHEME, "s3a://", "s3n://"))


def parse(uri: str) -> ObjectUri:
    """The parts of a URI. Raises ValueError with the rule that it breaks, which does not repeat the URI."""
    if not uri.startswith(SCHEME):
        raise ValueError("an object's address begins with s3:// in lower case")
    bucket, slash, key = uri.removeprefix(SCHEME).partition("/")
    if "@" in bucket and not _PIN.search(uri):
        # Possibly s3://KEY:SECRET@bucket: nothing of it is repeated.
        raise ValueError("keys of the object store do not belong into an address: the operator names a secret")
    pin = _PIN.search(uri)
    if pin is not None:
        bucket, key = (bucket, key[: -len(pin[0])]) if slash else (bucket[: -len(pin[0])], "")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ValueError("a bucket's name has 3 to 63 of a-z, 0-9, . and -, and no two dots in a row")
    if len(key.encode("utf-8", "surrogatepass")) > _MOST_KEY_BYTES:
        raise ValueError(f"a key takes at most {_MOST_KEY_BYTES:,} bytes")
    parts = key.removesuffix("/").split("/") if key else []
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("a key has no empty, . or .. parts")
    return ObjectUri(bucket, key, pin[1] if pin is not None else "")


def is_below(uri: ObjectUri, root: ObjectUri) -> bool:
    """Whether everything that a URI names is at a root or below it; `s3://b/data` does not hold `s3://b/data2`."""
    if uri.bucket != root.bucket:
        return False
    folder = root.key.removesuffix("/")
    return not folder or uri.key == folder or uri.key.startswith(f"{folder}/")


def copy_of(uri: ObjectUri) -> str:
    """Where the copy of a pinned URI is, below the folder of all copies: a folder, or the one file."""
    address = hashlib.sha256(uri.address.encode("utf-8", "surrogatepass")).hexdigest()
    folder = f"copies/{address[:32]}-{uri.digest[:32]}/files"
    return folder if uri.is_prefix else f"{folder}/{uri.key.rpartition('/')[2]}"


def secret_name(text: str) -> str:
    """The name in `secret://NAME`. Raises ValueError with the rule, which does not repeat the text."""
    name = text.removeprefix(SECRET)
    if not text.startswith(SECRET) or not _SECRET_NAME.fullmatch(name):
        raise ValueError(f"a secret is written {SECRET}NAME, with 1 to 63 letters, digits, ., _ and -")
    return name


def is_secret_name(name: str) -> bool:
    """Whether a secret can have this name."""
    return _SECRET_NAME.fullmatch(name) is not None


def hub_cache(token: str) -> str:
    """The folder in the cache for models of the Hub that are fetched with this secret; with none, for public ones.

    They are apart, so that nobody finds a private model who may not use its secret.
    """
    return f"hub-{hashlib.sha256(token.encode()).hexdigest()[:16]}" if token else "hub"
