"""Every command of the documentation, run as a reader would run it, page by page.

What stands for big models and other machines, and what is not run, is in ``tests/docs/table.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks
from tests.docs.runner import PageRun, Stand
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, Spawned, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

RUN = [page for page in PAGES if any(b.language not in ("text", "json") for b in blocks(page))]


@pytest.fixture(scope="module")
def stand(
    forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    """Yield an engine and a router that stand for those on other machines."""
    logs, port, at = tmp_path_factory.mktemp("stand"), free_port(), free_port()
    names = ["--served-model-name", tiny_model, "tiny"]
    argv = [tiny_model, *small_engine(port), "--max-model-len=2048", *names]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = Server(forks.start("hexgen_vllm.serve", argv, logs / "engine", alone), port)
    engine.wait_healthy()
    words = [f"--port={at}", "--worker-urls", engine.url, "--tune=suggest"]
    router = Server(Spawned("hexgen_vllm.router", words, logs / "router"), at).wait_healthy()
    yield Stand(forks, tiny_model, port, at)
    assert router.program.stop() == 0
    assert engine.program.stop() == 0


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, stand: Stand, tmp_path: Path) -> None:
    with PageRun(stand, tmp_path) as run:
        for block in blocks(page):
            run.block(block)
