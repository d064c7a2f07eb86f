"""SQL that must not run, tried on new copies of the databases.

python -m examples.text2sql.hostile
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from examples.text2sql.databases import build_all
from examples.text2sql.main import opened
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.outcome import QueryLimits

FILE: Final = Path(__file__).with_name("hostile.sql")
TABLES: Final = {"library": "loan", "clinic": "visit", "shop": "purchase"}
_ESCAPES: Final = {"\\0": "\0", "\\u0007": "\a"}


def statements(dialect: str) -> tuple[str, ...]:
    """Return what must not run on ``dialect``; ``{table}`` stands for a table with an ``id``."""
    _, *sections = re.split(r"^---- (\w+)\n", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[str] = []
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        if name in ("all", dialect):
            found += re.split(r"\n----\n", body.removesuffix("\n"))
    for escaped, meant in _ESCAPES.items():
        found = [sql.replace(escaped, meant) for sql in found]
    return tuple(found)


def that_ran(database: Database, table: str, attempts: Iterable[str] | None = None) -> list[str]:
    """Try ``attempts``, all that there are by default; return those that gave a result."""
    if attempts is None:
        attempts = statements(database.dialect)
    tried = [(one, database.run(one.replace("{table}", table))) for one in attempts]
    return [attempt for attempt, outcome in tried if outcome.rows is not None]


def main() -> int:
    """Try everything on a new copy of every database; returns 1 when anything ran."""
    attempts = statements("sqlite")
    with tempfile.TemporaryDirectory() as folder:
        paths = build_all(Path(folder))
        before = {name: path.read_bytes() for name, path in paths.items()}
        with opened(paths, QueryLimits(time_s=0.3)) as databases:
            ran = [
                attempt
                for name, database in databases.items()
                for attempt in that_ran(database, TABLES[name], attempts)
            ]
        changed = [name for name, path in paths.items() if path.read_bytes() != before[name]]
    for attempt in ran:
        print(f"ran: {attempt}")
    print(
        f"hostile SQL: {len(ran)} of {len(attempts) * len(paths)} statements ran, "
        f"{len(changed)} of {len(paths)} databases changed"
    )
    return int(bool(ran or changed))


if __name__ == "__main__":
    sys.exit(main())
