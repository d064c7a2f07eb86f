"""The tool that compares what the simulator decides before and after a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.same_bytes import ROOT, SCENARIO, digest, main


def test_a_digest_is_of_the_decisions(tmp_path: Path) -> None:
    slack, again, other = (
        digest(ROOT, SCENARIO, policy, tmp_path) for policy in ("slack", "slack", "wlcaff+edf")
    )
    assert slack == again
    assert slack != other
    assert not list(tmp_path.iterdir())


def test_what_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no-such"):
        main(["--scenario", str(tmp_path / "no-such.yaml"), "--policy", "slack"])
    assert not capsys.readouterr().out
