"""Stand-ins for BIRD and Spider, in the layout in which they are published."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.text2sql.main import FILE

QUESTIONS: Mapping[str, Sequence[Mapping[str, str]]] = yaml.safe_load(FILE.read_text())


def entries() -> list[tuple[str, str, str]]:
    """Return database, question and gold query of three questions of each database."""
    return [(name, one["q"], one["sql"]) for name, some in QUESTIONS.items() for one in some[:3]]


def _tables(paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    return [{"db_id": name, "table_names_original": [], "column_names_original": []}
            for name in paths]  # fmt: skip


def build_bird(folder: Path, paths: Mapping[str, Path]) -> Path:
    """Write what BIRD's ``dev.zip`` holds."""
    found = [
        {"question_id": number, "db_id": name, "question": text,
         "evidence": "books refers to book" if number == 0 else "", "SQL": sql,
         "difficulty": "simple"}
        for number, (name, text, sql) in enumerate(entries())
    ]  # fmt: skip
    for name, path in paths.items():
        home = folder / "dev_databases" / name
        (home / "database_description").mkdir(parents=True)
        shutil.copy(path, home / f"{name}.sqlite")
        with (home / "database_description" / "x.csv").open("w") as file:
            csv.writer(file).writerow(["original_column_name", "column_name"])
    (folder / "dev.json").write_text(json.dumps(found))
    (folder / "dev.sql").write_text("".join(f"{sql}\t{name}\n" for name, _, sql in entries()))
    (folder / "dev_tables.json").write_text(json.dumps(_tables(paths)))
    return folder


def build_spider(folder: Path, paths: Mapping[str, Path]) -> Path:
    """Write what ``spider.zip`` holds."""
    found = [
        {"db_id": name, "query": sql, "query_toks": sql.split(), "query_toks_no_value": [],
         "question": text, "question_toks": text.split(), "sql": {}}
        for name, text, sql in entries()
    ]  # fmt: skip
    for name, path in paths.items():
        (folder / "database" / name).mkdir(parents=True)
        shutil.copy(path, folder / "database" / name / f"{name}.sqlite")
    (folder / "dev.json").write_text(json.dumps(found))
    (folder / "dev_gold.sql").write_text("".join(f"{sql}\t{name}\n" for name, _, sql in entries()))
    (folder / "tables.json").write_text(json.dumps(_tables(paths)))
    return folder
