"""Which tenant a key belongs to, and how much its clients can claim: ``--api-keys FILE``.

    keys:
      - key: sk-interactive            # or key-sha256: of it, in hexadecimal
        tenant: interactive
        max-priority: interactive      # a number, or system, interactive, default, bulk
        min-deadline-ms: 2000
        weight: 2                      # of its fair share
      - key-sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        tenant: gateway
        tenants: [web, batch]          # it may act for these, too; ["*"] is for all
        classes: [default, bulk]       # names of priorities; the highest is its ceiling
      - key: sk-operator
        tenant: operators
        admin: true

Claims beyond a ceiling are clamped (:mod:`hexgen_vllm.policy.claims`) and counted, never refused.
A workflow or session is known by its tenant and its id: the same id of two tenants is two
workflows, and nobody ends or moves that of another.

Keys of ``--api-key`` are each a tenant of their own when there are several, and all of one tenant
when there is one. Without keys everybody is in one trust domain: tenants are what requests say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from hexgen_vllm import wire
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.keys import digest
from hexgen_vllm.policy.claims import MAX_PRIORITY, Ceiling
from hexgen_vllm.router.words import CLASSES, as_id
from hexgen_vllm.types import OF
from hexgen_vllm.yaml_files import (
    Key,
    Located,
    read,
)

DEFAULT_TENANT: Final = "default"
ALL_TENANTS: Final = "*"
NO_CEILING: Final = Ceiling()
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_AT: Final = re.compile(r"(.*?)(?: - at `\$(.*)`)?")
_PART: Final = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks, as its key says.

    Attributes:
        tenant: whose key it is; ``None`` without keys: what requests say is then taken.
        others: tenants that it may act for besides; :data:`ALL_TENANTS` is everybody.
        ceiling: the most it can claim.
        admin: it may use admin routes.
        sees_all: it may be shown what all tenants do.
        scoped: ids of workflows belong to their tenant.
    """

    tenant: str | None = None
    others: frozenset[str] = frozenset()
    ceiling: Ceiling = NO_CEILING
    admin: bool = False
    sees_all: bool = True
    scoped: bool = False

    def acts_for(self, said: str | None) -> str:
        """Return the tenant of a request that names the tenant ``said``, ``None`` for none."""
        if self.tenant is None:
            return said or DEFAULT_TENANT
        if said is not None and (said in self.others or ALL_TENANTS in self.others):
            return said
        return self.tenant

    def own_id(self, tenant: str, workflow_id: str) -> str:
        """Return what a workflow of ``tenant`` is known by in the router.

        Ids of clients have no blanks, so that no two of different tenants are the same.
        """
        return f"{workflow_id}{OF}{tenant}" if self.scoped else workflow_id

    def engine_id(self, tenant: str, workflow_id: str) -> str:
        """Return what engines know a workflow by, legal on the wire."""
        return as_id(self.own_id(tenant, workflow_id))


ANYBODY: Final = Client()
"""Who asks where nobody has a key, without a ceiling."""


class KeyEntry(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """One key of the file.

    Attributes:
        tenant: whose it is.
        key: the key itself.
        key_sha256: or its SHA-256, in hexadecimal.
        tenants: tenants that it may act for besides.
        classes: names of priorities that it may claim.
        max_priority: the highest priority that counts, or its name; the highest of ``classes``,
            else 0, if not given.
        min_deadline_ms: the shortest deadline that counts, milliseconds.
        weight: of the tenant's share.
        admin: it is an admin key.
    """

    tenant: str
    key: str | None = None
    key_sha256: str | None = msgspec.field(default=None, name="key-sha256")
    tenants: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    max_priority: int | str | None = None
    min_deadline_ms: float = 0.0
    weight: float | None = None
    admin: bool = False

    def check(self) -> None:
        """Check what types do not say.

        Raises:
            ConfigError: something is wrong; one sentence that names it.
        """
        if (self.key is None) == (self.key_sha256 is None):
            raise ConfigError("give either key or key-sha256.")
        if self.key is not None and (not self.key or self.key != self.key.strip()):
            raise ConfigError("key must not be empty, nor begin or end with blanks.")
        if self.key_sha256 is not None and not _DIGEST.fullmatch(self.key_sha256):
            raise ConfigError("key-sha256 must be 64 hexadecimal digits.")
        for name in (self.tenant, *(one for one in self.tenants if one != ALL_TENANTS)):
            if not wire.NAME.fullmatch(name):
                raise ConfigError(
                    f"a tenant must be 1 to 64 letters, digits and _ . : / -, not {name!r}."
                )
        named = self.max_priority if isinstance(self.max_priority, str) else None
        for word in (*self.classes, *(() if named is None else (named,))):
            if word not in CLASSES:
                raise ConfigError(f"{word!r} must be one of {', '.join(CLASSES)}.")
        if isinstance(self.max_priority, int) and not abs(self.max_priority) <= MAX_PRIORITY:
            raise ConfigError("max-priority must be within 2**62 both ways.")
        if not 0.0 <= self.min_deadline_ms <= wire.MAX_TIME_MS:
            raise ConfigError(f"min-deadline-ms must be from 0 to {wire.MAX_TIME_MS:.0e}.")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError("weight must be a number above 0.")

    def digest(self) -> bytes:
        """Return the SHA-256 of the key."""
        if self.key is not None:
            return digest(self.key)
        return bytes.fromhex(self.key_sha256 or "")

    def client(self) -> Client:
        """Return who shows this key."""
        most = self.max_priority
        if isinstance(most, str):
            most = CLASSES[most]
        if most is None:
            most = max((CLASSES[word] for word in self.classes), default=0)
        ceiling = Ceiling(most, self.min_deadline_ms / 1000.0)
        return Client(
            self.tenant, frozenset(self.tenants), ceiling, self.admin, self.admin, scoped=True
        )


class KeyFile(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """The whole file.

    Attributes:
        keys: in it.
    """

    keys: tuple[KeyEntry, ...]


def read_keys(path: Path) -> KeyFile:
    """Read a file of keys.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; one sentence with the line,
            which never shows a key.
    """
    source = read(path)
    try:
        found = msgspec.convert(source.value, KeyFile)
    except msgspec.ValidationError as error:
        raise _wrong(source, str(error)) from None
    digests: set[bytes] = set()
    for i, one in enumerate(found.keys):
        try:
            one.check()
        except ConfigError as error:
            raise source.error(("keys", i), error) from None
        if one.digest() in digests:
            raise source.error(("keys", i), "this key is there twice.")
        digests.add(one.digest())
    _check_weights(source, found.keys)
    return found


def _check_weights(source: Located, keys: Iterable[KeyEntry]) -> None:
    weights: dict[str, float] = {}
    for i, one in enumerate(keys):
        if one.weight is not None and weights.setdefault(one.tenant, one.weight) != one.weight:
            raise source.error(("keys", i), f"tenant {one.tenant} has two different weights.")


def _wrong(source: Located, text: str) -> ConfigError:
    match = _AT.fullmatch(text)
    problem, at = (text, None) if match is None else match.groups()
    path: Key = ()
    for name, number in _PART.findall(at or ""):
        if number == "...":
            break
        path = (*path, int(number) if number else name)
    sentence = problem[:1].lower() + problem[1:].rstrip(".") + "."
    return source.error(path, sentence)
