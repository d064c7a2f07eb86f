"""The ``hexgen-vllm`` command.

Each subcommand lives beside the code it starts, in a module with ``add_arguments(parser)`` and
``main(args) -> int``; it is imported only when it is asked for, so that ``--help`` is quick and a
router needs neither torch nor vLLM. Benchmarks and tools are no part of the package: those
commands work in a clone of the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

from hexgen_vllm import __version__
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import Parser, known_names
from hexgen_vllm.program import exit_code

COMMANDS: Final[dict[tuple[str, ...], tuple[str, str]]] = {
    ("router",): ("hexgen_vllm.router.main", "place workflow calls on several engines"),
    ("sim",): ("hexgen_vllm.sim.command", "play a scenario in virtual time"),
    ("check-policy",): ("hexgen_vllm.check_policy", "check a placement policy of your own"),
    ("check",): ("hexgen_vllm.check_file", "list the mistakes of cluster, router, scenario files"),
    ("calibrate",): ("hexgen_vllm.calibrate.command", "measure an engine for the simulator"),
    ("text2sql",): ("hexgen_vllm.text2sql.command", "ask a database questions in plain language"),
    ("tune",): ("hexgen_vllm.tune.command", "find the knobs for recent workflows"),
    ("trace", "info"): ("hexgen_vllm.sim.workloads.traces.info", "say what a trace holds"),
    ("trace", "convert"): (
        "hexgen_vllm.sim.workloads.traces.convert",
        "write a trace in another format",
    ),
    ("trace", "sample"): (
        "hexgen_vllm.sim.workloads.traces.sample",
        "write some workflows of a trace",
    ),
    ("patch",): ("hexgen_vllm.patch.command", "apply optional patches to the installed vLLM"),
    ("reference",): ("tools.reference.command", "print options, files, endpoints, names"),
    ("explain",): ("hexgen_vllm.explain", "say where the time of a workflow went"),
    ("doctor",): ("hexgen_vllm.doctor", "check this installation and say what is missing"),
    ("completion",): ("hexgen_vllm.completion", "print what completes commands in a shell"),
    ("batch", "run"): ("hexgen_vllm.batches.run", "have a file of requests answered by a server"),
    ("batch", "status"): ("hexgen_vllm.batches.status", "show the batches of a server, or one"),
    ("batch", "cancel"): ("hexgen_vllm.batches.cancel", "end a batch of a server"),
    ("bench", "live"): ("hexgen_vllm.bench.live", "play workflows against real endpoints"),
    ("bench", "scheduler"): ("benchmarks.engine.scheduler", "time schedule() against stock vLLM"),
    ("bench", "preempt"): (
        "benchmarks.engine.preempt",
        "keep the KV of preempted calls against computing it again",
    ),
    ("bench", "react"): ("benchmarks.engine.react", "agents of many turns against stock vLLM"),
    ("bench", "router"): ("benchmarks.router.router", "cost of a call through the router"),
    ("bench", "decide"): ("benchmarks.router.decide", "cost of a decision, by engines and calls"),
    ("bench", "soak"): ("benchmarks.router.soak", "the router for long, with leaving and dying"),
    ("bench", "replicas"): ("benchmarks.router.replicas", "routers that die under load"),
    ("bench", "sim"): ("benchmarks.engine.sim", "time the simulator"),
    ("bench", "mix"): (
        "benchmarks.engine.mix",
        "one engine: calls with deadlines beside a backlog",
    ),
    ("bench", "kv"): ("benchmarks.kv.kv", "time saving and restoring KV blocks"),
    ("bench", "report"): ("benchmarks.evaluation.report", "compare all policies in the simulator"),
}
_GROUPS: Final = {
    "batch": "answer requests by file, when nobody else needs the engines",
    "bench": "measure engines, scheduler, router, simulator and KV copies",
    "trace": "read recorded traffic, our own or public",
}


def _usage(words: tuple[str, ...]) -> str:
    """Return the help text for the commands under ``words``."""
    depth = len(words)
    rows: dict[str, str] = {}
    for path, (_, doc) in COMMANDS.items():
        if path[:depth] == words:
            rows[path[depth]] = doc if len(path) == depth + 1 else _GROUPS[path[depth]]
    prog = " ".join(("hexgen-vllm", *words))
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {doc}" for name, doc in rows.items()]
    return "\n".join([f"usage: {prog} COMMAND [options]", "", "commands:", *lines])


def _split(argv: Sequence[str]) -> tuple[tuple[str, ...], Sequence[str]]:
    """Return the longest command that ``argv`` starts with, and the rest."""
    for length in (2, 1):
        words = tuple(argv[:length])
        if words in COMMANDS:
            return words, argv[length:]
    words = tuple(argv[:1]) if argv and argv[0] in _GROUPS else ()
    return words, argv[len(words) :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (2: the command line or an option is wrong)."""
    words, rest = _split(sys.argv[1:] if argv is None else argv)
    return exit_code(" ".join(("hexgen-vllm", *words)), lambda: _run(words, rest))


def _run(words: tuple[str, ...], rest: Sequence[str]) -> int:
    if words not in COMMANDS:
        return _explain(words, rest)
    module, parser = command(words)
    return int(module.main(parser.parse_args(rest)))


def command(words: tuple[str, ...]) -> tuple[ModuleType, Parser]:
    """Return the module of a command and the parser of its options.

    Raises:
        ConfigError: it is not part of the installed package.
    """
    module = _load(COMMANDS[words][0])
    parser = Parser(prog=" ".join(("hexgen-vllm", *words)), description=COMMANDS[words][1])
    module.add_arguments(parser)
    return module, parser


def _load(name: str) -> ModuleType:
    """Import the module of a command; one outside the package lies beside it in a clone.

    Of the package that is installed, that is the clone in which the command is given.

    Raises:
        ConfigError: it lies outside, and this is no clone.
    """
    folder, package = name.partition(".")[0], Path(__file__).resolve().parent.name
    for clone in (Path(__file__).resolve().parents[1], Path.cwd()):
        whole = all((clone / part / "__init__.py").exists() for part in (folder, package))
        if whole and str(clone) not in sys.path:
            sys.path.append(str(clone))
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{name} is not part of the installed package; run this in a clone of the repository."
        ) from None


def _explain(words: tuple[str, ...], rest: Sequence[str]) -> int:
    """Answer ``--help``, ``--version`` and unknown commands."""
    if rest and rest[0] == "--version":
        print(f"hexgen-vllm {__version__}")
        return 0
    if not rest or rest[0] in ("-h", "--help"):
        print(_usage(words))
        return 0 if rest else 2
    names = sorted({path[len(words)] for path in COMMANDS if path[: len(words)] == words})
    prog, known = " ".join(("hexgen-vllm", *words)), known_names(rest[0], names)
    print(f"{prog}: unknown command {rest[0]!r}; known are {known}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
