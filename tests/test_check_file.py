"""``hexgen-vllm check``: every mistake of a file, each once, and none that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.check_file import check
from tests.test_cli import run

CLUSTER = """
defaults: {model: m, prt: 3}
engines:
  - {name: a, device: [0, 1], device2: 1}
  - {name: b, hexgen: {ordr: edf}}
  - {port: 99999}
rooter: {}
router:
  alpa: 1
  port: x
  alpha: 7
restart: maybe
restart: true
"""
SCENARIO = """
fleet:
  - {device: A1000, count: 2}
  - {cost: {c0: x, c1: 1, c2: 0, p0: 0, p1: 0, p2: 0}, count: 0}
workload: {workflows: -3, retires: skewed, trace: none.jsonl}
arrivals: {loads: many}
policies: [slak, slack, slack]
seeds: [1, 1]
nonsense: 3
"""
ROUTER = """
worker-urls: nowhere
policy: best
queue-sise: 3
alpha: 2
selector: 5
max-held-calls: 1
queue-size: 2
port: -1
"""

# Each of several things in one list or mapping, and what is wrong in another file that is named.
ITEMS = """
api-keys: missing.yaml
worker-urls:
  - http://a:1
  - nowhere
  - http://b:0
  - c=http://c:1
  - c=http://d:1
tenant-weights: {a: -1, b: .nan, c: 2}
worker-dns: [nohost, "b:99999"]
overload: protct
stretch: .inf
"""
WEIGHTS = """
engines: [{name: a, url: nowhere}]
log_dir: 3
router: {tenant-weights: {a: -1, b: 0}}
"""


@pytest.mark.parametrize(
    ("kind", "text", "lines"),
    [
        ("cluster", CLUSTER, [2, 4, 4, 5, 6, 6, 7, 9, 10, 11, 12, 13]),
        ("scenario", SCENARIO, [3, 4, 4, 5, 5, 5, 6, 7, 7, 8, 9]),
        ("router", ROUTER, [2, 3, 4, 5, 6, 8, 9]),
        ("router", ITEMS, [2, 3, 3, 3, 9, 9, 10, 10, 11, 12]),
        ("cluster", WEIGHTS, [2, 3, 4, 4]),
        # What is needed is missing, and the rest is read all the same.
        ("scenario", "workload: {workflows: 0}\nseeds: []\npolicies: 1\n", [1, 1, 1, 2, 3]),
        ("cluster", "router: {prt: 1}\nrestart: 3\nlog_dir: 5\n", [1, 1, 2, 3]),
        ("cluster", "engines: []\nrouter: {alpha: 7}\n", [1, 2]),
        ("cluster", "enginess: []\n", [1, 1]),
    ],
)
def test_all_mistakes_are_listed_by_line(
    tmp_path: Path, kind: str, text: str, lines: list[int]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    found, mistakes = check(path)
    assert found == kind
    assert [getattr(one, "line", 0) for one in mistakes] == lines, "\n".join(map(str, mistakes))
    assert len(set(map(str, mistakes))) == len(mistakes)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("cluster", "engines:\n  - {name: a, model: m}\nrouter: {alpha: 0.5}\n"),
        ("scenario", "fleet: reference-4\narrivals: {loads: [0.5]}\n"),
        ("router", "worker-urls: [http://a:1]\nmax-held-calls: 7\n"),
        ("router", "overload: off\ntune: off\n"),
        ("cluster", "engines: [{name: a, model: m}]\nrouter: {overload: off, tune: off}\n"),
        ("router", ""),
    ],
)
def test_a_good_file_is_said_to_be_one(
    tmp_path: Path, kind: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    code, out, err = run(capsys, "check", str(path))
    assert (code, err) == (0, "")
    assert kind in out


def test_what_is_no_yaml_and_one_good_file_among_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, other = (tmp_path / name for name in ("good", "bad", "other"))
    good.write_text("alpha: 0.5\n")
    bad.write_text("a: [\n")
    other.write_text("- a\n")
    missing = tmp_path / "missing"
    code, out, err = run(capsys, "check", *map(str, (bad, good, other, missing)))
    assert code == 2
    assert str(good) in out
    assert [name for name in ("bad", "good", "other", "missing") if f"/{name} " in err] == [
        "bad", "other", "missing",
    ]  # fmt: skip
    assert err.count("\n") == 3


def test_the_kind_may_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("restart: true\n")
    code, _, err = run(capsys, "check", "--kind", "router", str(path))
    assert code == 2
    assert "unknown option 'restart'" in err
