"""``bench kv`` times what it says, checks every copy first, and writes what it measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.engine import vllm_copies
from benchmarks.kv import (
    kv,
    kv_beside,
    kv_break_even,
    kv_sweep,
)
from benchmarks.kv.subjects import (
    CopyBed,
    CopyCase,
    Way,
)
from hexgen_vllm.errors import ConfigError, HexgenError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sweep, "MIN_SAMPLE_S", 1e-6)
    monkeypatch.setattr(kv_sweep, "SAMPLES", 1)
    monkeypatch.setattr(vllm_copies, "plugs", lambda: ([], "it is not looked for"))
    monkeypatch.setattr(kv_beside, "STEPS", 2)
    monkeypatch.setattr(kv_beside, "COPIED_BYTES", {"cpu": 4 << 20})
    monkeypatch.setattr(kv_break_even, "COPIED_BYTES", {"cpu": 1 << 20})


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kv.add_arguments(parser)
    return parser.parse_args(argv)


def index_select_way(bed: CopyBed) -> Way:
    """What ``--against`` loads in the tests."""
    ids = torch.tensor(bed.block_ids)
    host = [torch.empty_like(tensor[ids]) for tensor in bed.tensors]

    def save() -> None:
        for tensor, kept in zip(bed.tensors, host, strict=True):
            kept.copy_(tensor[ids])

    def restore() -> None:
        for tensor, kept in zip(bed.tensors, host, strict=True):
            tensor[ids] = kept

    return Way("index_select", save, restore)


def broken_way(bed: CopyBed) -> Way:
    good = index_select_way(bed)
    return Way("broken", good.save, lambda: (good.restore(), bed.tensors[-1].fill_(0)))


def test_rows_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kv.json"
    args = parse("--page-kib=4,8", "--blocks=3", "--layers=2", "--parts", "sweep", f"--json={out}")
    args.against = f"{__name__}:index_select_way"

    assert kv.main(args) == 0

    written = json.loads(out.read_text())
    ways = [row["way"] for row in written["rows"] if row["page_bytes"] == 8192]
    assert ways == ["contiguous", "cpu", "reference", "per block", "index_select"]
    assert {row["total_bytes"] for row in written["rows"]} == {4096 * 6, 8192 * 6}
    for row in written["rows"]:
        assert row["save_gb_per_s"] > 0
        assert row["restore_gb_per_s"] > 0
        if row["way"] == "contiguous":
            assert (row["save_fraction"], row["restore_fraction"]) == (1, 1)
    assert written["environment"]["device"] == "cpu"
    assert written["environment"]["vllm_kernels"] == "absent: it is not looked for"
    assert written.keys() == {"environment", "command", "rows"}
    printed = capsys.readouterr().out
    assert "index_select" in printed
    assert len(printed.splitlines()) == 4  # environment, heading, two cases


def test_decode_steps_are_timed_beside_copies(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = kv_beside.measure("cpu")
    assert row.way == "cpu"
    assert row.copied_gb_per_s > 0
    assert row.slowdown == pytest.approx(row.beside_ms / row.alone_ms - 1)
    assert "GB/s" in capsys.readouterr().out


def test_break_even_follows_the_measured_speeds(tmp_path: Path) -> None:
    out = tmp_path / "kv.json"
    assert kv.main(parse("--parts", "break-even", f"--json={out}")) == 0
    found = json.loads(out.read_text())["break_even"]
    assert [row["model"] for row in found["models"]] == [m.name for m in kv_break_even.MODELS]
    for row in found["models"]:
        assert row["save_gb_per_s"] > 0
        assert len(row["copy_ms"]) == len(row["recompute_ms"]) == len(found["contexts"])
        assert row["recompute_ms"] == sorted(row["recompute_ms"])


def test_break_even_is_where_copying_gets_cheaper() -> None:
    model = kv_break_even.Model("made up", 1e9, layers=10, kv_heads=5, head_size=10, heads=5)
    speeds = (2.0, 2.0)
    fast = kv_break_even.line(model, 2, 1e12, speeds, beside=False)
    assert fast.token_bytes == 2000  # 2 us a token for both copies, 2 ms for computing it
    assert fast.copy_ms[0] == pytest.approx(256 * 0.002 + 0.4)
    assert fast.recompute_ms[0] == pytest.approx(512 + 1e3 * 2e-9 * 256**2 / 2)
    assert fast.from_tokens == 1
    assert kv_break_even.line(model, 2, 1e14, speeds, beside=False).from_tokens == 32
    assert kv_break_even.line(model, 2, 1e18, speeds, beside=False).from_tokens is None


def test_a_way_that_corrupts_blocks_is_not_timed() -> None:
    with pytest.raises(HexgenError, match="broken: blocks differ after save and restore"):
        kv_sweep.measure(CopyCase(4096, 2), "cpu", [broken_way])


def test_a_plug_may_pass() -> None:
    rows = kv_sweep.measure(CopyCase(64, 1), "cpu", [lambda bed: None])
    assert [row.way for row in rows] == ["contiguous", "cpu", "reference", "per block"]


def test_default_cases_span_the_sizes_and_stay_bounded() -> None:
    cases = kv_sweep.make_cases(kv.PAGE_KIB, kv.BLOCKS, kv.LAYERS, kv.MAX_MIB_CUDA)
    assert {case.page_bytes for case in cases} >= {4 << 10, 2 << 20}
    assert {case.num_blocks for case in cases} >= {1, 4096}
    assert max(case.total_bytes for case in cases) <= 1 << 30


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--device=tpu"], "'tpu' is none of"),
        (["--device=cuda:x"], "none of cpu, cuda and cuda:N"),
        (["--device=cuda:99"], "is not there"),
        (["--max-mib=0"], "as little as 0 MiB"),
        (["--against=nowhere:at_all"], "'nowhere:at_all' cannot be loaded"),
        (["--blocks=1", "--page-kib=4", "--layers=1", "--json=/nowhere/x"], "cannot be written"),
    ],
)
def test_wrong_options(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kv.main(parse(*argv))


@pytest.mark.parametrize("text", ["", "0", "4,", "-1", "x"])
def test_wrong_lists(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--blocks={text}")
    assert "is no list of positive numbers" in capsys.readouterr().err


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs torch, which comes with vLLM"):
        kv.main(parse())
