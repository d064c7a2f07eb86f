"""One table of how calls end: nothing else is said in metrics, and each is what clients see."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hexgen_vllm.errors import Refused
from hexgen_vllm.policy import overload
from hexgen_vllm.router.endpoints import ENDPOINT_NAMES
from hexgen_vllm.router.errors import (
    ENDINGS,
    Blame,
    EngineFailed,
    Outcome,
    from_error,
    refused,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_outcome_has_an_ending() -> None:
    assert ENDINGS.keys() == set(Outcome)
    for outcome, ending in ENDINGS.items():
        assert 100 <= ending.status <= 599
        assert bool(ending.message) == (outcome is not Outcome.ANSWERED)
        assert (ending.engine_is_well is False) <= (ending.blame is Blame.ENGINE)


def test_an_outcome_is_its_word_wherever_it_is_written() -> None:
    for outcome in Outcome:
        assert f"{outcome}" == str(outcome) == outcome.value == json.loads(json.dumps(outcome))
        assert {outcome.value: 1}[outcome] == 1
        assert Outcome.of(outcome.value) is outcome
    assert Outcome.of("a word of a policy's own") is Outcome.REFUSED


def test_policies_refuse_in_these_words() -> None:
    said = (overload.saturated("c"), overload.unattainable("c"), overload.expired("c", 1.0),
            overload.no_endpoints("c"))  # fmt: skip
    for rejection in said:
        ending = Outcome(rejection.reason).ending
        assert (rejection.status, ending.blame) == (ending.status, Blame.LOAD)


@pytest.mark.parametrize("outcome", [o for o in Outcome if o.ending.blame is not Blame.NOBODY])
def test_errors_are_the_objects_of_the_table(outcome: Outcome) -> None:
    for error in (EngineFailed(outcome), refused(outcome)):
        answer = from_error(error, "r")
        assert isinstance(answer.body, bytes)
        said = json.loads(answer.body)["error"]
        assert (answer.status, said["code"]) == (outcome.ending.status, outcome.value)
        assert said["message"] == outcome.ending.message
    assert isinstance(refused(outcome), Refused)


def test_the_pages_and_alerts_know_these_words_and_no_others() -> None:
    words = {outcome.value for outcome in Outcome}
    table = (DOCS / "metrics.md").read_text().partition("| outcome |")[2].partition("\n\n")[0]
    written = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", table, re.M))
    assert written == {o.value: ending.meaning for o, ending in ENDINGS.items()}
    some = re.compile(r"\b(?:rejected|engine|internal|bad)-(?:[a-z]+-)*[a-z]+\b")
    for path in (DOCS / "router.md", DOCS / "router-faults.md", DOCS / "troubleshooting.md"):
        for word in re.findall(r"`((?:rejected|engine)-[a-z-]+)`", path.read_text()):
            assert word in words | {"engine-k"}, (path.name, word)
    for word in some.findall((ROOT / "examples" / "grafana" / "alerts.yml").read_text()):
        assert word in words
    assert len(set(ENDPOINT_NAMES)) == len(ENDPOINT_NAMES)


def test_the_code_says_no_other_words() -> None:
    words = {outcome.value for outcome in Outcome}
    for path in (ROOT / "hexgen_vllm").rglob("*.py"):
        said = re.findall(r'"((?:rejected|engine)-[a-z-]+)"', path.read_text())
        for word in set(said) - {"engine-stats"}:
            assert word in words, path
