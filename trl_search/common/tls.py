"""The certificates of HTTPS clients."""

from __future__ import annotations

import functools
import ssl

import httpx


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The default certificates, or those of SSL_CERT_FILE, read once: reading them for each client takes 0.1 s."""
    return httpx.create_ssl_context()
