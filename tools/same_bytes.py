"""Whether the simulator decides as it did: a digest of one run for each policy.

    python -m tools.same_bytes [--against REVISION] [--scenario FILE] [--policy NAME ...]

Each policy plays the scenario once, at a load at which calls wait and give way. Its digest is the
SHA-256 of the figures and of the timeline, which has every call with its engine and its times.
With ``--against`` the package of that revision of the repository plays the same, and the exit
status is 1 if a digest differs: for changes that are to change no decision.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from hexgen_vllm.sim.policies import NAMES

ROOT: Final = Path(__file__).resolve().parents[1]
SCENARIO: Final = ROOT / "examples" / "scenarios" / "demo.yaml"
_RUN: Final = ("--workflows", "60", "--seed", "11", "--load", "1.1")


def digest(package: Path, scenario: Path, policy: str, folder: Path) -> str:
    """Return the digest of one run.

    Args:
        package: folder in which ``hexgen_vllm`` lies.
        scenario: what is played.
        policy: by which policy.
        folder: for the files.

    Raises:
        SystemExit: the simulator failed.
    """
    files = folder / "figures.json", folder / "timeline.json"
    outputs = "--json", str(files[0]), "--timeline", str(files[1])
    command = [sys.executable, "-m", "hexgen_vllm", "sim", str(scenario), "--policy", policy]
    env = {**os.environ, "PYTHONPATH": str(package)}
    run = subprocess.run(
        [*command, *_RUN, *outputs],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(run.stderr or f"{policy} failed in {package}")
    found = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    for file in files:
        file.unlink()
    return found


def unpack(revision: str, folder: Path) -> Path:
    """Put the package of ``revision`` into ``folder`` and return that."""
    archive = subprocess.run(
        ["git", "archive", revision, "hexgen_vllm"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main(arguments: Iterable[str] | None = None) -> int:
    """Print the digests."""
    parser = argparse.ArgumentParser(prog="python -m tools.same_bytes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--against", metavar="REVISION", help="compare with this revision")
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--policy", nargs="+", default=NAMES, dest="policies")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    scenario, differ = chosen.scenario.resolve(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        old = unpack(chosen.against, folder / "old") if chosen.against else None
        for policy in chosen.policies:
            now = digest(ROOT, scenario, policy, folder)
            verdict = ""
            if old is not None:
                same = digest(old, scenario, policy, folder) == now
                verdict = "  same" if same else "  DIFFERENT"
                differ += [] if same else [policy]
            print(f"{policy:<28} {now[:16]}{verdict}", flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
