"""Starts vLLM programs in about three seconds instead of twenty: vLLM is imported once.

    with ForkServer() as forks:
        server = forks.start("hexgen_vllm.serve", [MODEL, "--port=8001"], log)
        assert server.wait() == 0

A child process imports vLLM and then forks itself for each program. Nothing of vLLM has run in
it by then: plugins, flags and engine are each program's own. For tests only, since it also lets
the CPU engine be forked off its HTTP server, where vLLM would start a new interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tests.e2e.programs import ANSWER_S

PRELOADED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "hexgen_vllm.engine.scheduler",
)
PR_SET_PDEATHSIG = 1


class Forked:
    """A program that the fork server started."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; ``None`` while it runs."""
        if self._code is None:
            self._code = self._server.ask({"poll": self.pid})["code"]
        return self._code

    def wait(self, timeout_s: float = ANSWER_S) -> int:
        """Wait for the end and return the exit code."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running after {timeout_s:g} s: {self.text()[-2000:]}")
            time.sleep(0.02)
        return code

    def stop(self) -> int:
        """Ask it to stop and return its exit code; what it leaves behind is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def text(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(errors="replace")


class ForkServer:
    """The process that has vLLM imported; leaving the context ends it and all it started."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forkserver"],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(self._line()) == "ready"

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(
        self,
        module: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Forked:
        """Run ``main()`` of ``module`` with ``sys.argv[1:]`` being ``argv``.

        Args:
            module: as behind ``python -m``.
            argv: its arguments.
            log: file for all it prints.
            env: environment variables on top of this process's.
            folder: where it runs, by default where this process does.
        """
        wanted = {"module": module, "argv": list(argv), "log": str(log), "env": dict(env or {})}
        wanted["folder"] = str(folder or Path.cwd())
        return Forked(self, self.ask(wanted)["pid"], log)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return dict(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def serve() -> None:
    """Answer requests until there are no more; in a forked child, run its program instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in PRELOADED:
        import_module(name)
    _answer(answers, "ready")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            _answer(answers, {"code": _exit_code(request["poll"])})
            continue
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            answers.close()
            _become(request, parent)
        _answer(answers, {"pid": pid})


def _answer(answers: Any, value: object) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(request: Mapping[str, Any], parent: int) -> NoReturn:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    log = os.open(request["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.environ.update(request["env"])
    _let_engines_be_forked()
    sys.argv = ["vllm", *request["argv"]]
    module = import_module(request["module"])
    os.chdir(request["folder"])
    sys.exit(module.main())


def _let_engines_be_forked() -> None:
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def forked(vllm_config: Any) -> None:
        update(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(forked)


if __name__ == "__main__":
    serve()
