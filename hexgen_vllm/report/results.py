"""Result files: of most commands a JSON list with one object per run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import todays_name
from hexgen_vllm.wire import from_json

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the runs in ``path``, none if it does not exist, by today's names of policies.

    Raises:
        ConfigError: the file does not hold a list of runs.
    """
    if not path.exists():
        return []
    try:
        rows = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} does not hold a list of results.")
    for row in rows:
        if isinstance(row.get("policy"), str):
            row["policy"] = todays_name(row["policy"])
    return rows


def write(path: Path, content: object) -> None:
    """Write ``content`` to ``path``; whoever reads it meanwhile sees the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def check_writable(path: Path | None) -> None:
    """Make the folder of an output file before hours of work depend on it.

    Raises:
        ConfigError: nothing can be written there.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written.")
