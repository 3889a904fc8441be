"""HTTP over TLS, from the same files as gRPC, which are looked at before every handshake."""

from __future__ import annotations

import ssl

from shardyard_coordinator.serve.certificates import TlsUnusable, Watched, read_pair
from shardyard_coordinator.serve.protection import TlsFiles


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context whose handshakes use the files as they are then. Raises: TlsUnusable."""
    watched = Watched(files, _context)
    current = watched.first

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal current
        current = watched.changed() or current
        connection.context = current

    watched.first.sni_callback = renew  # OpenSSL calls it whether or not a client names a server.
    return watched.first


def _context(files: TlsFiles) -> ssl.SSLContext:
    read_pair(files)  # Says what is wrong with a file in words.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A session that is resumed would keep a client certificate of an authority that was replaced.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if files.client_ca else ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one: the files were replaced in between.
        raise TlsUnusable(f"{files.certificate}: {error.strerror or error}; give both files of one pair") from error
    return context
