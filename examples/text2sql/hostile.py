"""SQL that must not run: what a misled or hostile model may write, for tests and for the demo.

python -m examples.text2sql.hostile
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from examples.text2sql.databases import build_all
from examples.text2sql.sandbox import Sandbox

HOSTILE: Final = (
    "DELETE FROM {table}",
    "DROP TABLE {table}",
    "UPDATE {table} SET id = 0",
    "INSERT INTO {table} DEFAULT VALUES",
    "REPLACE INTO {table} (id) VALUES (1)",
    "CREATE TABLE stolen AS SELECT * FROM {table}",
    "CREATE TEMP TABLE stolen (id INTEGER)",
    "CREATE TEMP VIEW stolen AS SELECT * FROM {table}",
    "CREATE TEMP TRIGGER t AFTER INSERT ON {table} BEGIN SELECT 1; END",
    "ALTER TABLE {table} RENAME TO stolen",
    "WITH doomed AS (SELECT id FROM {table}) DELETE FROM {table} WHERE id IN doomed",
    "SELECT id FROM {table}; DROP TABLE {table}",
    "SELECT id FROM {table} WHERE id = '1'; DELETE FROM {table} --'",
    "SELECT 1 /* */; /* */ UPDATE {table} SET id = 0 -- and nothing",
    "PRAGMA writable_schema = ON",
    "PRAGMA query_only = OFF",
    "SELECT * FROM pragma_database_list",
    "SELECT name FROM pragma_table_info('{table}')",
    "SELECT sql FROM sqlite_schema",
    "SELECT COUNT(*) FROM sqlite_master",
    "ATTACH DATABASE '/tmp/stolen.db' AS stolen",
    "VACUUM INTO '/tmp/stolen.db'",
    "BEGIN IMMEDIATE",
    "SAVEPOINT s",
    "REINDEX",
    "ANALYZE",
    "EXPLAIN DELETE FROM {table}",
    "SELECT load_extension('/tmp/evil.so')",
    "SELECT writefile('/tmp/stolen', name) FROM {table}",
    "SELECT readfile('/etc/passwd')",
    "SELECT randomblob(100000000)",
    "SELECT zeroblob(100000000)",
    "SELECT length(printf('%.*c', 100000000, 'x'))",
    "SELECT fts3_tokenizer('simple')",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
    "WITH r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r",
    "SELECT COUNT(*) FROM {table} a, {table} b, {table} c, {table} d, {table} e",
    "SELECT a.id FROM {table} a, {table} b",
    "",
    "-- nothing",
    "SELECT 1\0; DROP TABLE {table}",
)
"""``{table}`` stands for a table with an ``id``, of some hundred rows."""
TABLES: Final = {"library": "loan", "clinic": "visit", "shop": "purchase"}


def that_ran(path: Path, table: str, attempts: Iterable[str] = HOSTILE) -> list[str]:
    """Try ``attempts`` on the database ``path``; return those that gave a result."""
    sandbox = Sandbox(path)
    tried = [(attempt, sandbox.run(attempt.format(table=table))) for attempt in attempts]
    return [attempt for attempt, outcome in tried if outcome.rows is not None]


def main() -> int:
    """Try everything on a new copy of every database; returns 1 when anything ran."""
    with tempfile.TemporaryDirectory() as folder:
        paths = build_all(Path(folder))
        before = {name: path.read_bytes() for name, path in paths.items()}
        ran = [attempt for name, path in paths.items() for attempt in that_ran(path, TABLES[name])]
        changed = [name for name, path in paths.items() if path.read_bytes() != before[name]]
    for attempt in ran:
        print(f"ran: {attempt}")
    print(
        f"hostile SQL: {len(ran)} of {len(HOSTILE) * len(paths)} statements ran, "
        f"{len(changed)} of {len(paths)} databases changed"
    )
    return int(bool(ran or changed))


if __name__ == "__main__":
    sys.exit(main())
