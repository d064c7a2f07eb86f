"""The table of vllm-router's flags is whole, and what it says of ours is so."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.docs.pages import ROOT
from tools.reference.commands import parser_of

TEXT = (ROOT / "docs" / "migration.md").read_text()
FLAG = re.compile(r"`(--[a-z][a-z0-9-]+)[^`]*`")
DEFAULT = re.compile(r"default ([\d.]+)")
# `vllm-router --help`, 0.1.17
PEER = frozenset(
    """
    --api-key --balance-abs-threshold --balance-rel-threshold --cache-threshold
    --cb-failure-threshold --cb-success-threshold --cb-timeout-duration-secs
    --cb-window-duration-secs --cors-allowed-origins --decode --decode-policy --decode-selector
    --disable-circuit-breaker --disable-retries --enable-igw --enable-program-scheduling
    --eviction-interval-secs --health-check-endpoint --health-check-interval-secs
    --health-check-timeout-secs --health-failure-threshold --health-success-threshold --host
    --intra-node-data-parallel-size --kv-aware-session-affinity-ttl-secs --kv-connector
    --kv-event-block-size --kv-event-model --kv-event-replay-source --kv-event-source
    --kv-penalty-disk --kv-penalty-external --kv-penalty-host --log-dir --log-level
    --max-concurrent-requests --max-payload-size --max-tree-size --mini-lb --pd-kv-events --policy
    --port --prefill --prefill-policy --prefill-selector --program-scheduling-config-json
    --prometheus-host --prometheus-port --queue-size --queue-timeout-secs
    --rate-limit-tokens-per-second --request-id-headers --request-timeout-secs
    --retry-backoff-multiplier --retry-initial-backoff-ms --retry-jitter-factor
    --retry-max-backoff-ms --retry-max-retries --router-temperature --selector --service-discovery
    --service-discovery-namespace --service-discovery-port --vllm-discovery-address
    --vllm-pd-disaggregation --wasm-middleware --wasm-middleware-route --wasm-middleware-sha256
    --worker-startup-check-interval --worker-startup-timeout-secs --worker-urls
    """.split()  # noqa: SIM905 - a list of this length reads badly with quotes
)


class Row(NamedTuple):
    """One line of the table."""

    flags: list[str]
    here: str
    note: str


def rows() -> list[Row]:
    table = TEXT.partition("vllm-router: begin -->")[2].partition("<!-- vllm-router: end")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(FLAG.findall(first), here, note) for first, here, note in cells]


def test_every_flag_of_the_peer_is_there_once() -> None:
    assert sorted(flag for row in rows() for flag in row.flags) == sorted(PEER)


def test_what_is_called_the_same_is_there() -> None:
    actions = {flag: a for a in parser_of(("router",))._actions for flag in a.option_strings}
    for row in rows():
        if row.here == "same":
            assert set(row.flags) <= set(actions), row
        for flag in FLAG.findall(f"{row.here} {row.note}"):
            assert flag in actions or "hexgen-vllm calibrate" in row.note, flag


def test_the_defaults_named_are_ours() -> None:
    actions = {flag: a for a in parser_of(("router",))._actions for flag in a.option_strings}
    named = [(flag, found[1]) for row in rows() for flag in row.flags
             if (found := DEFAULT.search(row.note))]  # fmt: skip
    assert len(named) >= 5
    for flag, default in named:
        if flag == "--prometheus-host":
            continue
        said = re.search(r"\(default: ([\d.]+)\)", actions[flag].help or "")
        assert said is not None
        assert float(said[1]) == float(default), flag
