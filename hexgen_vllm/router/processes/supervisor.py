"""Several router processes on one port: started, watched, stopped together."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from hexgen_vllm import signals
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.http.errors import why
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.processes.router_process import RouterProcess

_LOG = logging.getLogger(__name__)
_LOOK_S: Final = 0.1
_PAUSE_S: Final = 1.0  # before a process is started again
CANNOT_START: Final = 3
"""Exit code of a process that another try would not help."""
Serve = Callable[[RouterOptions, DispatchOptions, RouterProcess], None]


class Processes:
    """The router processes.

    Args:
        options: of all of them.
        dispatch: of all of them.
        serve: what each one does; it has to be importable.
    """

    def __init__(self, options: RouterOptions, dispatch: DispatchOptions, serve: Serve) -> None:
        self._options, self._dispatch, self._serve = options, dispatch, serve
        self._found: dict[int, SpawnProcess] = {}
        self._again_s: dict[int, float] = {}
        self._ending = False

    async def run(self) -> None:
        """Run until a signal, then until all processes have ended.

        Raises:
            ConfigError: the address cannot be had, or a process could not start.
        """
        with (
            signals.handled(self._on_signal),
            tempfile.TemporaryDirectory(prefix="hexgen-router-") as folder,
            self._reserved() as held,
        ):
            self._options = replace(self._options, port=held.getsockname()[1])
            try:
                for index in range(self._options.router_workers):
                    self._start(index, folder)
                await self._watch(folder)
            finally:
                await self._end()

    def _reserved(self) -> socket.socket:
        """Return a socket that keeps the port; it does not listen."""
        where = (self._options.host, self._options.port)
        try:
            family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
            return _bound(socket.socket(family, kind), address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {where[0]}:{where[1]}: {why(error)}.") from None

    def _start(self, index: int, folder: str) -> None:
        which = RouterProcess(index, self._options.router_workers, folder)
        process = multiprocessing.get_context("spawn").Process(
            target=self._serve, args=(self._options, self._dispatch, which)
        )
        process.start()
        self._found[index] = process

    async def _watch(self, folder: str) -> None:
        """Start processes again that end, until all are told to end."""
        loop = asyncio.get_running_loop()
        while not self._ending:
            await asyncio.sleep(_LOOK_S)
            for index, process in self._found.items():
                if process.is_alive() or self._ending:
                    continue
                if process.exitcode == CANNOT_START:
                    raise ConfigError("a router process could not start.")
                at_s = self._again_s.setdefault(index, loop.time() + _PAUSE_S)
                if loop.time() >= at_s:
                    _LOG.warning("process %d ended with %s; started again", index, process.exitcode)
                    del self._again_s[index]
                    self._start(index, folder)
                    break  # the dictionary has changed

    def _on_signal(self) -> None:
        self._ending = True
        for process in self._found.values():
            if process.is_alive():
                process.terminate()

    async def _end(self) -> None:
        """Wait until all have ended; processes that were not told are told."""
        if not self._ending:
            self._on_signal()
        while any(process.is_alive() for process in self._found.values()):
            await asyncio.sleep(_LOOK_S)
        for process in self._found.values():
            process.join()


def _bound(held: socket.socket, address: Any) -> socket.socket:
    """Return ``held`` bound to ``address``, where several processes may listen; close it if not."""
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError:
        held.close()
        raise
    return held
