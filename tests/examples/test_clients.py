"""Clients that this environment has; ``make test-clients`` runs the others."""

from __future__ import annotations

import pytest

from examples.other_stacks import order
from tests.examples import clients


@pytest.mark.parametrize("command", [clients.CURL, clients.module("openai_sdk")])
async def test_two_calls_are_one_workflow(command: tuple[str, ...]) -> None:
    await clients.check(command)


def test_the_order_of_calls_that_cannot_be_made_is_not_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert order.main(["http://127.0.0.1:9/v1", "MODEL"]) == 2
    assert capsys.readouterr().err == "http://127.0.0.1:9/v1 cannot be used: Connection error.\n"
