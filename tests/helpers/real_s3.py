"""A local S3 server from the package index (moto), with one bucket, for one test file."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator
from typing import Any

BUCKET = "lake"
REGION = "eu-west-1"


@contextlib.contextmanager
def real_s3() -> Iterator[tuple[str, Any]]:
    """The URL of a server on loopback that is gone at the end, and a client of it (boto3)."""
    # Heavy, and needed by few tests.
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    # All servers of a process have one memory: another file's bucket may be in it.
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=30).close()
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="setup", aws_secret_access_key="setup", region_name=REGION
    )
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    try:
        yield endpoint, client
    finally:
        server.stop()
