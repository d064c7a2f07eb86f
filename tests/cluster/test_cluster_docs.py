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


def shown(index: int, folder: Path) -> ClusterSpec:
    """Return what a file on the page says."""
    path = folder / "cluster.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[index])
    return load(path)


def test_the_file_shown_is_one(tmp_path: Path) -> None:
    spec = shown(0, tmp_path)
    assert [engine.name for engine in spec.engines] == ["fast", "slow", "other"]
    assert spec.engines[1].args == ("--max-num-seqs=16",)
    assert spec.restart


def test_an_engine_may_have_several_devices(tmp_path: Path) -> None:
    big, many = shown(1, tmp_path).engines
    assert (big.device, big.args) == ("0,1", ("--tensor-parallel-size=2",))
    assert (many.device, many.args) == ("2,3", ("--data-parallel-size=2",))


def test_every_key_is_documented() -> None:
    assert documented("key of an engine") == {f.name for f in fields(EngineEntry)}
    assert documented("other key") == {f.name for f in fields(ClusterSpec)} - {"engines"}
