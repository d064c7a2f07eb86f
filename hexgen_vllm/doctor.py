"""``hexgen-vllm doctor``: what of this installation works, and what is missing.

Exit code 0 when everything needed is there, 1 when something is broken. A missing vLLM is not an
error: a router or a simulator runs without it.

What must import vLLM or torch to know is asked of a process of its own, for a few seconds; with
``--wait`` for as long as it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Final, NamedTuple

from hexgen_vllm import __version__
from hexgen_vllm.errors import HexgenError

NEEDED: Final = (
    "aiohttp", "httptools", "msgspec", "numpy", "prometheus-client", "pyyaml", "uvloop",
)  # fmt: skip
"""What the package cannot do without, by its name for pip."""
_MARK: Final = b"hexgen-vllm-doctor "
EXTRAS: Final = {
    "client": "openai",
    "dns": "dnspython",
    "k8s": "kubernetes-asyncio",
    "kv-events": "pyzmq",
    "otel": "opentelemetry-exporter-otlp",
    "plot": "matplotlib",
    "ray": "ray",
    "replicas": "redis",
    "text2sql": "sqlglot",
}
"""What each optional part needs, by its name for pip."""


PATIENCE_S: Final = 4.0
"""Seconds for what must import vLLM or torch."""


class Finding(NamedTuple):
    """One line of the report: ``ok``, ``absent`` (allowed), ``unknown`` or ``broken``."""

    subject: str
    verdict: str
    detail: str


def _python() -> Finding:
    good = sys.version_info >= (3, 10)
    return Finding("python", "ok" if good else "broken", platform.python_version())


def _router() -> Finding:
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        return Finding("router", "broken", f"missing: {', '.join(missing)}")
    return Finding("router", "ok", f"hexgen-vllm {__version__}")


def _compiled() -> Finding:
    spec = util.find_spec("hexgen_vllm.policy.coordinator")
    if spec is not None and (spec.origin or "").endswith(".so"):
        return Finding("compiled", "ok", "policies, simulator and router are compiled")
    return Finding(
        "compiled",
        "absent",
        "plain Python; a published wheel or HEXGEN_COMPILE=1 needs two thirds of the CPU time",
    )


def _vllm() -> Finding:
    if util.find_spec("vllm") is None:
        return Finding("vllm", "absent", "no engine can be started here; the router can")
    try:
        compat = import_module("hexgen_vllm.engine.compat")
        compat.check_seams()
    except HexgenError as error:
        return Finding("vllm", "broken", str(error))
    version = compat.found_version()
    said = compat.doubt(version) or f"vLLM {version}, all seams found"
    return Finding("vllm", "ok", f"{said}{_frontend()}")


def _frontend() -> str:
    """Return what is different with the server that vLLM is asked for here."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() in ("", "0"):
        return ""
    return (
        "; its Rust server is on: no middleware, so that metadata comes in vllm_xargs (from our "
        "router too), X-Vllm-Priority and X-Session-ID, and telemetry from the engine process at "
        "--hexgen-stats-port, by default that of --port + 10000"
    )


def _plugin() -> Finding:
    found = {e.name for e in metadata.entry_points(group="vllm.general_plugins")}
    if "hexgen" not in found:
        return Finding("plugin", "absent", "not installed as a package: no --scheduling-policy")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "hexgen" not in allowed.split(","):
        return Finding("plugin", "broken", "VLLM_PLUGINS is set and does not name hexgen")
    if util.find_spec("vllm") is None:
        return Finding("plugin", "absent", "installed, but there is no vLLM to load it")
    return Finding("plugin", "ok", "--scheduling-policy urgency is available")


def _kernels() -> Finding:
    if util.find_spec("torch") is None:
        return Finding("kernels", "absent", "torch is not installed")
    described = import_module("hexgen_vllm.kernels").describe()
    return Finding("kernels", "ok", f"KV copies on {described}")


def _compilers() -> Finding:
    found = [c for c in ("g++", "nvcc") if shutil.which(c)]
    if not found:
        return Finding("compilers", "absent", "kernels fall back to torch or Triton")
    return Finding("compilers", "ok", ", ".join(found))


def _extras() -> Finding:
    missing = [extra for extra, name in EXTRAS.items() if not _is_installed(name)]
    if missing:
        wanted = f"hexgen-vllm[{','.join(missing)}]"
        return Finding("extras", "absent", f"{', '.join(missing)}; pip install '{wanted}'")
    return Finding("extras", "ok", ", ".join(EXTRAS))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


CHECKS: Final[tuple[Callable[[], Finding], ...]] = (
    _python,
    _router,
    _compiled,
    _vllm,
    _plugin,
    _kernels,
    _compilers,
    _extras,
)


SLOW: Final = {"vllm": _vllm, "kernels": _kernels}
"""Checks that import what takes long to import."""


def _told_by_child(wait: bool) -> dict[str, Finding]:
    """Return what a process of its own finds in the time it has; without vLLM, nothing."""
    if all(util.find_spec(name) is None for name in ("vllm", "torch")):
        return {}
    code = "from hexgen_vllm import doctor; doctor.tell_slow()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            said, _ = child.communicate(timeout=None if wait else PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
    found = {}
    for line in said.splitlines():
        if line.startswith(_MARK):
            finding = Finding(*json.loads(line.removeprefix(_MARK)))
            found[finding.subject] = finding
    if child.returncode == -signal.SIGKILL:
        for name in SLOW.keys() - found.keys():
            found[name] = Finding(name, "unknown", "takes long to find out: --wait")
    return found


def tell_slow() -> None:
    """Print what the slow checks find, a line each, among whatever what they import prints."""
    for check in SLOW.values():
        print(f"\n{_MARK.decode()}{json.dumps(check())}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--wait",
        action="store_true",
        help=f"wait for everything, not only for {PATIENCE_S:g} seconds",
    )


def main(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if one is broken."""
    told = _told_by_child(args.wait)
    subjects = {check: name for name, check in SLOW.items()}
    findings = [told.get(subjects.get(check, "")) or check() for check in CHECKS]
    if args.json:
        print(json.dumps([f._asdict() for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.subject:<10} {finding.verdict:<7} {finding.detail}")
    return int(any(f.verdict == "broken" for f in findings))
