"""What docs/cluster.md says of the cluster file is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from hexgen_vllm.cluster import ClusterSpec, EngineEntry, load

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()


def documented(heading: str) -> set[str]:
    """Return the keys in the first column of the table under ``heading``."""
    rows = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def test_the_file_shown_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "cluster.yaml"
    path.write_text(shown)
    spec = load(path)
    assert [engine.name for engine in spec.engines] == ["fast", "slow", "other"]
    assert spec.engines[1].args == ("--max-num-seqs=16",)
    assert spec.restart


def test_every_key_is_documented() -> None:
    assert documented("key of an engine") == {f.name for f in fields(EngineEntry)}
    assert documented("other key") == {f.name for f in fields(ClusterSpec)} - {"engines"}
