"""The plugin where vLLM is not one we know, and what the drop-in does to its surroundings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen_vllm.engine import serve

OTHER_VLLM = """
import contextlib, io, json, logging, sys
import vllm.version
vllm.version.__version__ = "{version}"
import vllm.v1.core.sched.scheduler as theirs
{change}
logged = io.StringIO()
logging.getLogger("hexgen_vllm").addHandler(logging.StreamHandler(logged))

from hexgen_vllm import serve
from hexgen_vllm.engine import plugin
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def attempt(run):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = run()
        except SystemExit as end:
            code = end.code
    return {{"code": code, "said": said.getvalue()}}

plugin.register()
plugin.register()
parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
plain = parser.parse_args([])
print(json.dumps({{
    "logged": logged.getvalue(),
    "plain": [plain.scheduling_policy, plain.scheduler_cls, plain.additional_config],
    "asked": attempt(lambda: parser.parse_args(["--scheduling-policy=urgency"]) and 0),
    "drop_in": attempt(lambda: serve.main(["--version"])),
}}))
"""


def behaviour(version: str, change: str = "") -> dict[str, object]:
    script = OTHER_VLLM.format(version=version, change=change)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "change", "sentence"),
    [
        (
            "0.27.1",
            "",
            "hexgen_vllm supports vLLM 0.28 to 0.33, but vLLM 0.27.1 is installed.",
        ),
        (
            "0.99.0",
            "theirs.Scheduler._request_remaining_blocks = lambda self: 0",
            "vLLM 0.99.0 has no Scheduler._request_remaining_blocks(self, request) as hexgen_vllm "
            "needs it; supported is vLLM 0.28 to 0.33.",
        ),
    ],
)
def test_a_vllm_that_cannot_be_driven_is_refused_only_to_who_asks(
    version: str, change: str, sentence: str
) -> None:
    assert behaviour(version, change) == {
        "logged": f"{sentence}\n",
        "plain": ["fcfs", None, {}],
        "asked": {"code": 2, "said": f"vllm: {sentence}\n"},
        "drop_in": {"code": 2, "said": f"{sentence}\n"},
    }


@pytest.mark.engine
@pytest.mark.slow
def test_a_newer_vllm_with_every_seam_is_used() -> None:
    found = behaviour("0.99.0")
    assert found["logged"] == ""
    assert found["plain"] == ["fcfs", None, {}]
    assert found["asked"] == {"code": 0, "said": ""}


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, None), ("", "hexgen"), ("a", "a,hexgen"), ("a,hexgen,b", "a,hexgen,b")],
)
def test_our_plugin_is_added_to_an_allow_list(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if before is not None:
        monkeypatch.setenv("VLLM_PLUGINS", before)
    serve.allow_plugin_in_children()
    assert os.environ.get("VLLM_PLUGINS") == after


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return a table of distributions that stands for what is installed."""
    table: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in table:
            raise importlib.metadata.PackageNotFoundError(name)
        return table[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return table


def test_an_installed_distribution_answers_for_itself(distribution: dict[str, str]) -> None:
    distribution["vllm"] = "1.2.3"
    serve.answer_for_distribution()
    assert importlib.metadata.version("vllm") == "1.2.3"


@pytest.mark.engine
def test_a_missing_distribution_is_answered_for_and_no_other(distribution: dict[str, str]) -> None:
    import vllm

    distribution["other"] = "4.5"
    serve.answer_for_distribution()
    assert importlib.metadata.version("vllm") == vllm.__version__
    assert importlib.metadata.version("other") == "4.5"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("nonsense")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["m"], ["m"]),
        (["m", "--config"], ["m", "--config"]),
        (["m", "--config", "none.yaml"], ["m", "--config", "none.yaml"]),
        (["m", "--config", "list.yaml"], ["m", "--config", "list.yaml"]),
        (["m", "--config", "bad.yaml"], ["m", "--config", "bad.yaml"]),
        (["m", "--config", "a.yaml", "-x"], ["m", "--no-hexgen-a-b", "--config", "a.yaml", "-x"]),
        (["--config", "a.yaml"], ["--no-hexgen-a-b", "--config", "a.yaml"]),
    ],
)
def test_what_a_file_switches_off_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("hexgen-a_b: false\nhexgen-c: true\nother: false\n")
    Path("list.yaml").write_text("- 1")
    Path("bad.yaml").write_text("a: [")
    assert serve.with_switched_off(args) == expected


CHOICE = """
import json, pathlib, sys, tempfile
from benchmarks.engine import headless
from hexgen_vllm.engine import plugin
plugin.register()
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

folder = tempfile.mkdtemp()
pathlib.Path(folder, "config.json").write_text(json.dumps(headless._MODEL))

def config():
    return EngineArgs(
        model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=512,
        scheduler_cls="hexgen_vllm.UrgencyScheduler",
    ).create_engine_config()

print(">", config().scheduler_config.scheduler_cls)
init = VllmConfig.__post_init__
def as_for_a_model_with_rules(self, *args):
    init(self, *args)
    if self.scheduler_config.scheduler_cls is None:
        self.scheduler_config.scheduler_cls = "vllm.rules.OfItsOwn"
VllmConfig.__post_init__ = as_for_a_model_with_rules
try:
    print(">", config().scheduler_config.scheduler_cls)
except Exception as error:
    print(">", type(error).__name__, error)
"""


@pytest.mark.engine
@pytest.mark.slow
def test_a_model_that_vllm_schedules_itself_is_refused_and_no_other() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHOICE], capture_output=True, text=True, check=True
    )
    ours, refused = (w[2:] for w in done.stdout.splitlines() if w.startswith("> "))
    assert ours == "hexgen_vllm.UrgencyScheduler"
    assert refused.startswith("ConfigError Urgency scheduling cannot serve")
    assert "vllm.rules.OfItsOwn" in refused
