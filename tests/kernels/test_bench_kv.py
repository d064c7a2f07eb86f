"""``bench kv`` times what it says, checks every copy first, and writes what it measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from hexgen_vllm.bench import kv
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.kernels.subjects import CopyBed, CopyCase, Way


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "MIN_SAMPLE_S", 1e-6)
    monkeypatch.setattr(kv, "SAMPLES", 1)


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
    args = parse("--page-kib=4,8", "--blocks=3", "--layers=2", f"--json={out}")
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
    printed = capsys.readouterr().out
    assert "index_select" in printed
    assert len(printed.splitlines()) == 4  # environment, heading, two cases


def test_a_way_that_corrupts_blocks_is_not_timed() -> None:
    with pytest.raises(HexgenError, match="broken: blocks differ after save and restore"):
        kv.measure(CopyCase(4096, 2), "cpu", [broken_way])


def test_a_plug_may_pass() -> None:
    rows = kv.measure(CopyCase(64, 1), "cpu", [lambda bed: None])
    assert [row.way for row in rows] == ["contiguous", "cpu", "reference", "per block"]


def test_default_cases_span_the_sizes_and_stay_bounded() -> None:
    cases = kv.make_cases(kv.PAGE_KIB, kv.BLOCKS, kv.LAYERS, kv.default_max_mib("cuda"))
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
