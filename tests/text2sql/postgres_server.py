"""A real server of PostgreSQL for tests, out of the distribution's packages."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hexgen_vllm.ports import free_ports

PASSWORD: Final = "s3cret"
HINT: Final = "no PostgreSQL here: the distribution's package postgresql has it"


def programs() -> Path | None:
    """Return the folder of ``initdb`` and ``pg_ctl``, ``None`` if there is none."""
    found = shutil.which("pg_ctl")
    homes = [Path(found).resolve().parent] if found else []
    homes += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((home for home in homes if (home / "initdb").exists()), None)


@contextmanager
def running() -> Iterator[str]:
    """Run a server of its own; gives the URL of its superuser's database.

    It does not run as root, so root gives its folder to another user. That is none of pytest's:
    those are closed to others.
    """
    made = tempfile.TemporaryDirectory(prefix="hexgen-postgres-")
    with made as folder, _running(Path(folder)) as url:
        yield url


@contextmanager
def _running(folder: Path) -> Iterator[str]:
    home = programs()
    assert home is not None, HINT
    user = None
    if os.getuid() == 0:
        user = next(name for name in ("postgres", "nobody") if _exists(name))
        shutil.chown(folder, user)
    data, (port,) = folder / "data", free_ports("127.0.0.1", 1)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def call(*words: str) -> None:
        made = subprocess.run(
            words, user=user, cwd=folder, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout

    call(str(home / "initdb"), "-D", str(data), "-U", "admin", "-A", "scram-sha-256", "-N",
         f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C")  # fmt: skip
    settings = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off "
        "-c shared_buffers=8MB -c max_connections=20 -c autovacuum=off"
    )
    log = str(folder / "log")
    call(str(home / "pg_ctl"), "-D", str(data), "-w", "-l", log, "-o", settings, "start")
    try:
        yield f"postgresql://admin:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        call(str(home / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
