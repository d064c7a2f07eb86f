"""The fixtures of the text-to-SQL agent, for the example that uses it."""

from __future__ import annotations

from tests.text2sql.conftest import databases, paths, scripted

__all__ = ["databases", "paths", "scripted"]
