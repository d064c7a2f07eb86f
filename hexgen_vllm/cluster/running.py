"""What every cluster can do, whoever starts its engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

RunningT = TypeVar("RunningT", bound="Running")


class Running(ABC):
    """A cluster that can be started and stopped; an async context manager that does both."""

    @abstractmethod
    def summary(self) -> str:
        """Return what serves where, in one line."""

    @abstractmethod
    async def start(self) -> None:
        """Start everything; whoever called stops it, also when this fails half-way."""

    @abstractmethod
    async def watch(self) -> None:
        """Run until something that is not started again dies."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop everything. May be called again."""

    @abstractmethod
    def kill(self) -> None:
        """Kill everything at once, for those who cannot wait for :meth:`stop`."""

    async def __aenter__(self: RunningT) -> RunningT:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
