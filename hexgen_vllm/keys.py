"""API keys as they are shown in ``Authorization: Bearer KEY``, and compared.

Only digests are compared, of one length: how long that takes tells nothing of a key that came
close.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


def digest(key: str) -> bytes:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def bearer(header: str) -> str:
    """Return the key of an ``Authorization`` header, empty if it shows none."""
    scheme, _, key = header.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def shows(header: bytes, keys: Iterable[str]) -> bool:
    """Return whether an ``Authorization`` header shows one of ``keys``."""
    shown = bearer(header.decode("utf-8", "surrogateescape"))
    known = [hmac.compare_digest(digest(shown), digest(key)) for key in keys]
    return bool(shown) and any(known)
