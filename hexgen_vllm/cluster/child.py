"""``python child.py PARENT COMMAND…``: runs COMMAND, and ends it when PARENT dies.

The supervisor starts everything through this file, so that nothing outlives it even when it is
killed without a chance to clean up. Run by path and alone: it must cost next to nothing.

It stays between the two, because what kills the parent may kill the parent's children as well, as
Ray does: a server killed like that leaves its own children behind, and they the memory of a GPU.
So the kill hits this process; the server gets SIGTERM, and ends its children itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
GRACE_S = 20
"""What a program without a parent gets to end by itself, and its children too."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies; exit at once if it is not ``parent``."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit(1)


def become(command: list[str], parent: int) -> None:
    """Become ``command``."""
    die_with_parent(parent)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}.")


def run(parent: int, command: list[str]) -> int:
    """Run ``command`` to its end and return how it ended, as :func:`os.waitpid` says it."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is whom to pass it to
    here = os.getpid()
    program = os.fork()
    if not program:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        become(command, here)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, number)
        if os.getppid() != parent:  # nobody is left to lose patience
            signal.alarm(GRACE_S)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGALRM, lambda number, frame: os.killpg(0, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    status = os.waitpid(program, 0)[1]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes now does not change that status
    if os.getppid() != parent:  # nor to clear up after it
        os.killpg(0, signal.SIGKILL)
    return status


def end_like(status: int) -> None:
    """End as a child with that status did."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core file is enough
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    end_like(run(int(sys.argv[1]), sys.argv[2:]))
