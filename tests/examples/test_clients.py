"""Clients that this environment has; ``make test-clients`` runs the others."""

from __future__ import annotations

import pytest

from tests.examples import clients


@pytest.mark.parametrize("command", [clients.CURL, clients.module("openai_sdk")])
async def test_two_calls_are_one_workflow(command: tuple[str, ...]) -> None:
    await clients.check(command)
