"""Run vLLM's own tests of its scheduler with ours in place of theirs.

    python tools/upstream_tests.py [-- PYTEST-ARGUMENT ...]

The source distribution of the installed vLLM is downloaded once from the package index, for
``tests/v1/core``; that takes some minutes and 50 MB. The tests run twice, on the stock classes and
on ``UrgencyScheduler``. What passes on the first and fails on the second must be explained in
:data:`EXPLAINED`, else the exit code is 1. Tests that need a model of the Hugging Face hub get a
made-up one of its kind where only its configuration matters, and fail on both runs otherwise.

This file is also the pytest plugin of both runs: their ``tests`` is a package, and so is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache" / "vllm-sdist"
SUITE: Final = "tests/v1/core"
BUILD_TOOLS: Final = ("setuptools-rust", "setuptools-scm")
OURS, RESULTS = "HEXGEN_UPSTREAM_OURS", "HEXGEN_UPSTREAM_RESULTS"

_ABOUT = "tests/v1/core/"
_MADE_UP = ("harness", "it builds a scheduler without its constructor, or a call past add_request")
_ARRIVAL = (
    "harness",
    "its calls arrived in 1970: an age that absurd counts as now, so they stand as they were added",
)
EXPLAINED: Final[dict[str, tuple[str, str]]] = {
    _ABOUT + name: why
    for name, why in {
        "prefix_cache/test_partial_prefix_cache_hits.py"
        "::test_connector_finish_registers_partial_tail_before_cleanup": _MADE_UP,
        "test_async_scheduler.py"
        "::test_abort_request_when_structured_output_fsm_cannot_advance": _MADE_UP,
        "test_scheduler.py::test_abort_request_when_structured_output_fsm_cannot_advance": _MADE_UP,
        "test_scheduler.py::test_delayed_kv_connector_free_keeps_scheduler_active": _MADE_UP,
        "test_scheduler.py::test_stop_via_update_from_output": _MADE_UP,
        "test_scheduler.py::test_scheduler_reset_prefix_cache": (
            "harness",
            "it takes the waiting queue for a list",
        ),
        "test_scheduler.py::test_priority_scheduling_arrival_time_tiebreaker": _ARRIVAL,
        "test_scheduler.py::test_priority_scheduling_equal_priority_preemption": _ARRIVAL,
        "test_scheduler.py::test_priority_scheduling_fcfs_fallback": _ARRIVAL,
        "test_scheduler.py::test_priority_scheduling_mixed_priority_and_arrival": _ARRIVAL,
        "test_deferred_block_free.py"
        "::test_allocation_retry_waits_for_fence_then_succeeds[priority-2]": (
            "harness",
            "it changes priorities of running calls; ours reads them when a call is added",
        ),
        "test_scheduler.py::test_diffusion_scheduler_is_selected_by_default": (
            "policy",
            "diffusion models are refused: vLLM has a scheduler of its own for them",
        ),
    }.items()
}
"""Tests of vLLM that fail with our scheduler, by name: kind (policy, harness), reason."""


# The source distribution.


def sdist(version: str) -> Path:
    """Return the folder of the unpacked tests of a vLLM version; download them if need be."""
    home = CACHE / version
    if home.is_dir():
        return home
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = download(version, Path(scratch))
        tree = Path(scratch, "tree")
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if "/tests/" in m.name and m.isreg()]
            for member in members:
                member.name = member.name.split("/", 1)[1]
            tar.extractall(tree, members, filter="data")
        tree.rename(home)
    return home


def download(version: str, folder: Path) -> Path:
    """Fetch the archive with pip, which wants to know its metadata and so runs its set-up.

    Raises:
        SystemExit: it cannot be had.
    """
    print(f"downloading the sources of vLLM {version}", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    tools = folder / "tools"
    install = [*pip, "install", "-q", "--target", str(tools), *BUILD_TOOLS]
    subprocess.run(install, check=False, capture_output=True)
    env = {
        **os.environ,
        "PYTHONPATH": str(tools),
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": version,
    }
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    fetch = [*pip, "download", "-q", *options, f"vllm=={version}"]
    done = subprocess.run(fetch, env=env, check=False, capture_output=True, text=True)
    found = list(folder.glob("*.tar.gz"))
    if not found:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise SystemExit(f"The sources of vLLM {version} cannot be downloaded: {lines[-1]}")
    return found[0]


# The two runs.


def run(home: Path, ours: bool, arguments: Sequence[str]) -> dict[str, str]:
    """Run the tests; return the outcome of each by name, with the error of those that failed."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.json")
        path = [str(home), str(Path(__file__).parent), str(ROOT)]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            RESULTS: str(results),
            OURS: str(int(ours)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull]
        options = [f"--rootdir={home}", "-p", "no:cacheprovider", "-p", Path(__file__).stem]
        quiet = ["--tb=no", "--no-header", "--no-summary", "-W", "ignore"]
        subprocess.run(
            [*command, *options, *quiet, SUITE, *arguments], cwd=home, env=env, check=False
        )
        found: dict[str, str] = json.loads(results.read_text())
        return found


def verdict(stock: dict[str, str], ours: dict[str, str]) -> int:
    """Print the table of what only ours fails; return the number of unexplained ones."""
    failed = {n: why for n, why in ours.items() if why and stock.get(n) == ""}
    passed = sum(not why for why in stock.values())
    unexplained = 0
    for name, why in sorted(failed.items()):
        kind, reason = EXPLAINED.get(name, EXPLAINED.get(name.split("[")[0], ("UNEXPLAINED", why)))
        unexplained += kind == "UNEXPLAINED"
        print(f"{kind:<12} {name}\n             {reason}")
    kinds = Counter(
        EXPLAINED.get(n, EXPLAINED.get(n.split("[")[0], ("unexplained", "")))[0] for n in failed
    )
    print(
        f"\n{len(stock)} tests, {passed} pass on stock; of these {passed - len(failed)} pass on "
        f"ours and {len(failed)} fail ({', '.join(f'{n} {k}' for k, n in kinds.items()) or 'none'})"
    )
    known = {name.split("[")[0] for name in failed} | set(failed)
    for name in sorted(set(EXPLAINED) - known):
        print(f"note: {name} is explained, but passes or is gone")
    return unexplained


def main() -> int:
    """Run both; return 1 if a failure is unexplained."""
    parser = argparse.ArgumentParser(prog="python tools/upstream_tests.py", description=__doc__)
    parser.add_argument("pytest_args", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    from vllm.version import __version__

    home = sdist(__version__.split("+")[0])
    with ThreadPoolExecutor(2) as both:  # each is a process that takes minutes
        stock, ours = both.map(lambda ours: run(home, ours, args.pytest_args), (False, True))
    return int(verdict(stock, ours) > 0)


# The plugin.

_outcomes: dict[str, str] = {}


def pytest_configure(config: Any) -> None:
    """Give models of the hub a local stand-in, before any test module is imported."""
    del config
    if RESULTS not in os.environ:
        return
    from vllm.config import ModelConfig

    original = ModelConfig.__init__

    def with_local_model(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (args or Path(kwargs.get("model", "?")).is_dir()):
            kwargs["model"] = stand_in(kwargs.get("model"))
            kwargs["skip_tokenizer_init"] = True
        original(self, *args, **kwargs)

    ModelConfig.__init__ = with_local_model


def stand_in(name: str | None) -> str:
    """Return the folder of a model whose configuration is of the kind that ``name`` has."""
    folder = Path(tempfile.gettempdir(), "hexgen-upstream-models", str(name).replace("/", "--"))
    folder.mkdir(parents=True, exist_ok=True)
    longest = 2048 if name and name.startswith("facebook/") else 40960
    shape = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "max_position_embeddings": longest,
        "vocab_size": 50272,
        "torch_dtype": "float16",
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return str(folder)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put our class where the test modules have vLLM's."""
    if os.environ.get(OURS) != "1":
        return
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from hexgen_vllm.engine.scheduler import UrgencyScheduler

    # Which of the two an engine takes is its configuration's; a test names the class itself.
    overlapping = type("UrgencyScheduler", (UrgencyScheduler, AsyncScheduler), {})
    ours = {Scheduler: UrgencyScheduler, AsyncScheduler: overlapping}
    modules = {item.module for item in items}
    modules |= {m for n, m in sys.modules.items() if n.startswith("tests.v1.")}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in ours:
                setattr(module, name, ours[value])


def pytest_runtest_logreport(report: Any) -> None:
    """Note how a test ended: an empty text is a pass."""
    if report.skipped:
        _outcomes.setdefault(report.nodeid, "skipped")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message if crash else str(report.longrepr)).splitlines() or ["failed"]
        _outcomes[report.nodeid] = said[0][:300]
    elif report.when == "call":
        _outcomes.setdefault(report.nodeid, "")


def pytest_collectreport(report: Any) -> None:
    """Note modules that cannot be imported."""
    if report.failed:
        _outcomes[report.nodeid] = str(report.longrepr).splitlines()[-1][:300]


def pytest_sessionfinish() -> None:
    """Hand the outcomes to the process that asked for the run."""
    if RESULTS in os.environ:
        Path(os.environ[RESULTS]).write_text(json.dumps(_outcomes))


if __name__ == "__main__":
    sys.exit(main())
