"""Runs the blocks of one page as a reader would, in a folder of their own.

Servers are started, awaited and left running for the commands after them; a server on a port takes
the place of the one before it there. Everything else has to end with exit code 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.docs import table
from tests.docs.pages import ROOT, SHELL, Block, commands, words
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import LONG_CALLS, Program, environment, free_port, small_engine, wait_until

COMMAND_S = 300.0
VLLM = "vllm.entrypoints.cli.main"
SMALL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULT_PORTS = {"engine": 8000, "router": 30000, "other": 8000}
_ADDRESS = re.compile(rf"\b({'|'.join(map(re.escape, table.OWN_HOSTS))}):(\d{{4,5}})\b")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


class Stand(NamedTuple):
    """What stands for models and machines of the documentation."""

    forks: ForkServer
    model: str
    engine_port: int
    router_port: int


class Spawned:
    """A program with arguments, environment and folder of its own; see ``programs.Program``."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
            )

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """Ask it to stop and return its exit code; kill what does not."""
        self._process.terminate()
        try:
            return self.wait(30.0)
        finally:
            self._process.kill()

    def text(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(errors="replace")


def not_run(command: str) -> table.NotRun | None:
    """Return the entry of the table for a command that is not run."""
    return next((entry for entry in table.NOT_RUN if entry.part in command), None)


def kind_of(command: str) -> str | None:
    """Return what kind of server ``command`` starts: engine, cluster, router, other; or none."""
    said = words(command)
    if said[:2] == ["vllm", "serve"]:
        return "engine"
    if said[:3] == ["python", "-m", "hexgen_vllm.serve"]:
        return "cluster" if "--cluster" in said else "engine"
    if said[:2] == ["hexgen-vllm", "router"] or said[:1] == ["vllm-router"]:
        return "router"
    return "other" if said[:3] == ["python", "-m", "hexgen_vllm.testing.fake_server"] else None


class PageRun:
    """One page in one folder; leaving the context stops what runs."""

    def __init__(self, stand: Stand, folder: Path) -> None:
        self._stand, self._folder = stand, folder
        self._ports: dict[int, int] = {}
        self._servers: dict[int, Program] = {}
        self._before: list[str] = []  # assignments, for the commands after them
        self.ran: list[str] = []
        for name in ("examples", "docs"):
            (folder / name).symlink_to(ROOT / name)

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, *_: object) -> None:
        for program in reversed(self._servers.values()):
            with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                program.stop()

    def block(self, block: Block) -> None:
        """Run a block of shell or Python; write a block that is a file."""
        if block.file is not None:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._meant(block.text))
        elif block.language in SHELL:
            for command in commands(block):
                if not_run(command) is None:
                    self._command(command, block)
        elif block.language == "python":
            self._python(block)

    def _meant(self, text: str) -> str:
        """Return ``text`` with what the tables put in place of models, machines and ports."""
        for old, new in table.REPLACED.items():
            text = text.replace(old, new)
        for address, host in table.GIVEN.items():
            name = address.partition(":")[0]
            text = text.replace(address, f"{host}:<{self._stand.engine_port}>")
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.:])", host, text)
        for address in table.ROUTER_GIVEN:
            path = address.partition("//")[2].partition("/")[2]
            prefix = "http://" if address.startswith("http") else ""
            text = text.replace(
                address,
                f"{prefix}127.0.0.1:<{self._stand.router_port}>{'/' + path if path else ''}",
            )
        for model in table.MODELS:
            text = re.sub(rf"(?<![\w/]){re.escape(model)}(?![\w/])", self._stand.model, text)
        text = re.sub(r"(\bport: |--port[ =])(\d{4,5})", self._same_port, text)
        text = _ADDRESS.sub(lambda m: f"{m[1]}:{self._port(int(m[2]))}", text)
        return re.sub(r"<(\d+)>", r"\1", text)

    def _same_port(self, match: re.Match[str]) -> str:
        return f"{match[1]}{self._port(int(match[2]))}"

    def _port(self, documented: int) -> int:
        return self._ports.setdefault(documented, free_port())

    def _command(self, command: str, block: Block) -> None:
        self.ran.append(command)
        kind = kind_of(command) if words(command) else None
        if kind is not None:
            self._start(kind, command)
            return
        meant = self._meant(_shortened(command))
        if _only_assigns(command):
            self._before.append(meant)
        self._shell(meant, block)

    def _shell(self, meant: str, block: Block) -> None:
        script = "\n".join(["set -eu -o pipefail", *self._before, meant])
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{block.where}: {meant}\n{done.stdout}\n{done.stderr}"

    def _environment(self) -> dict[str, str]:
        (self._folder / ".curlrc").write_text("fail-with-body\nmax-time = 60\nretry = 0\n")
        programs = Path(sys.executable).parent
        return {
            **environment(),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CURL_HOME": str(self._folder),
            "PYTHONPATH": str(self._folder),
        }

    def _start(self, kind: str, command: str) -> None:
        said = words(command)
        documented = _flag(said, "--port") or str(DEFAULT_PORTS.get(kind, 30000))
        self._stop(int(documented))
        port = self._port(int(documented))
        argv = words(self._meant(_shortened(command)))
        log = self._folder / f"log-{len(self.ran)}"
        start: Callable[[], Program] = {
            "engine": lambda: self._engine(argv, port, log),
            "cluster": lambda: self._spawn(argv, log),
        }.get(kind, lambda: self._spawn([*argv, f"--port={port}", *_host(argv)], log))
        program = self._servers[int(documented)] = start()
        if kind == "cluster":
            wait_until(lambda: "ready: " in program.text(), program)
        path = "/health" if kind != "router" or "--worker-urls" in said else "/liveness"
        wait_until(lambda: _answers(port, path), program)

    def _stop(self, documented: int) -> None:
        running = self._servers.pop(documented, None)
        if running is not None:
            running.stop()

    def _engine(self, argv: list[str], port: int, log: Path) -> Program:
        module, rest = (VLLM, argv[1:]) if argv[0] == "vllm" else (argv[2], argv[3:])
        small = [word for word in small_engine(port) if not word.startswith("--served-model-name")]
        names = [] if "--served-model-name" in rest else ["--served-model-name", self._stand.model]
        exported = " ".join(self._before).replace("export ", " ")
        env = dict(word.split("=", 1) for word in shlex.split(exported))
        long = LONG_CALLS if "--max-num-seqs" in rest else ()  # a page that fills the batch
        argv = [*rest, *names, *small, *long]
        return self._stand.forks.start(module, argv, log, {**env, **SMALL}, self._folder)

    def _spawn(self, argv: list[str], log: Path) -> Program:
        line = " ".join(shlex.quote(word) for word in argv)
        script = "\n".join([*self._before, f"exec {line}"])
        return Spawned(["bash", "-c", script], log, self._environment(), self._folder)

    def _python(self, block: Block) -> None:
        self.ran.append(f"python block at {block.where}")
        path = self._folder / f"block_{block.line}.py"
        path.write_text(self._meant(block.text))
        if "from vllm import" not in block.text:
            self._shell(f"python {path.name}", block)
            return
        log = self._folder / f"log-{block.line}"
        program = self._stand.forks.start("tests.docs.run_file", [str(path)], log, SMALL)
        assert program.wait(COMMAND_S) == 0, f"{block.where}\n{program.text()[-4000:]}"


def _shortened(command: str) -> str:
    """Return ``command`` with the words of the table, before a comment and what it is piped to."""
    more = "".join(f" {entry.words}" for entry in table.APPENDED if entry.part in command)
    found = re.search(r"\s+[#|>&]", command)
    at = found.start() if found else len(command)
    return f"{command[:at]}{more}{command[at:]}"


def _only_assigns(command: str) -> bool:
    said = shlex.split(command, comments=True)
    return all(map(_ASSIGNMENT.match, said[said[:1] == ["export"] :]))


def _flag(said: Sequence[str], flag: str) -> str | None:
    for index, word in enumerate(said):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag:
            return said[index + 1]
    return None


def _host(argv: Sequence[str]) -> list[str]:
    return ["--host=127.0.0.1"] if "router" in argv else []


def _answers(port: int, path: str) -> bool:
    url = f"http://127.0.0.1:{port}{path}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60) as answer:
        return bool(answer.status == 200)
    return False
