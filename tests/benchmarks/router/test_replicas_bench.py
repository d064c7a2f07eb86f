"""Nothing is lost when a router, or what routers tell each other through, dies under load."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from benchmarks.router import replicas
from benchmarks.router.redis_server import HINT, program

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "replicas.md").read_text()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(program() is None and "CI" not in os.environ, reason=HINT)
async def test_nothing_is_lost_when_routers_and_their_store_die() -> None:
    parser = argparse.ArgumentParser()
    replicas.add_arguments(parser)
    words = ["--routers", "2", "--engines", "2", "--rate", "4", "--phase", "1.5"]
    seen = await replicas.play(parser.parse_args(words))
    assert seen["workflows"] > 0
    assert seen["calls_answered"] == 4 * seen["workflows"]
    assert seen["lost"] == seen["open_calls"] == seen["deadlines_forgotten"] == 0
    assert seen["kill_store_failed_tries"] == seen["stall_store_failed_tries"] == 0
    assert seen["replace_all_failed_tries"] == 0


def test_the_page_sets_nginx_up_as_it_is_tried() -> None:
    (block,) = re.findall(r"```text\n(map .*?)```", PAGE, re.S)
    conf = replicas.NGINX.replace("{{", "{").replace("}}", "}")
    tried = {" ".join(line.split()) for line in conf.splitlines()}
    shown = {" ".join(line.split()) for line in block.splitlines()}
    assert {line for line in shown if not line.startswith(("server router", "listen"))} <= tried
