"""Finds engines by itself: in DNS (``--worker-dns``) and among pods (``--service-discovery``).

    source (DNS, Kubernetes) ──engines wanted──► members ──join, drain──► watchers and fleet

A source that cannot be asked changes nothing: what it said last stays. One that says that there
are fewer engines has the others drained, and they are forgotten when their calls have ended.
"""

from __future__ import annotations
