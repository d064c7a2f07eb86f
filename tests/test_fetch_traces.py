"""The script that downloads public traces, with files of this machine in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.sim.workloads.traces.formats import FORMATS
from tools import fetch_traces
from tools.fetch_traces import TRACES, Trace, main


def test_every_trace_has_a_licence_and_a_format_that_is_read() -> None:
    assert len(TRACES) >= 8
    for trace in TRACES.values():
        assert trace.licence
        assert trace.format in FORMATS
        assert all(url.startswith("https://") for url in trace.urls)


def test_they_are_listed_downloaded_once_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(name)
    urls = tuple(f"file://{tmp_path}/{name}.json" for name in "ab")
    monkeypatch.setattr(fetch_traces, "TRACES", {
        "one": Trace("weka", "MIT", "one file", urls[:1]),
        "two": Trace("weka", "MIT", "two files", urls),
        "none": Trace("weka", "MIT", "no file", (f"file://{tmp_path}/c.json",)),
    })  # fmt: skip
    to = tmp_path / "to"
    assert main([]) == 0
    assert "two files" in capsys.readouterr().out
    assert main(["one", "two", f"--to={to}"]) == 0
    assert (to / "a.json").read_text() == "a"
    assert sorted(p.name for p in (to / "two").iterdir()) == ["a.json", "b.json"]
    (tmp_path / "a.json").unlink()
    assert main(["one", f"--to={to}"]) == 0, "it is there already"
    assert main(["none", f"--to={to}"]) == 1
    assert main(["nosuch"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
