"""Drives a headless Chromium over its DevTools protocol: as much of it as tests of a page need."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-default-apps", "--disable-extensions", "--hide-scrollbars",
    "--no-proxy-server", "--remote-debugging-port=0",
)  # fmt: skip


def chromium() -> str | None:
    """Return the path of an installed Chromium, ``None`` when there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page of a browser.

    Attributes:
        problems: what the page's console complained about, policy violations included.
        requested: every address the page asked for.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        self.requested: list[str] = []

    async def listen(self) -> None:
        """Take in answers and events until the browser is gone."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                future = self._answers.pop(said["id"])
                if not future.done():
                    future.set_result(said)
            else:
                self._note(said["method"], said["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append("a dialog opened: " + params["message"])

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await future
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def open(self, url: str) -> None:
        """Go to ``url`` and wait until it is there."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.do(f"{domain}.enable")
        await self.do("Page.navigate", url=url)
        await self.until(f"location.href === {url!r} && document.readyState === 'complete'")

    async def js(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, promises awaited."""
        said = await self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return it; the limit is the test's own."""
        while not (value := await self.js(expression)):
            await asyncio.sleep(0.05)
        return value

    async def picture(self) -> bytes:
        """Return what it looks like as PNG."""
        said = await self.do("Page.captureScreenshot", format="png")
        return base64.b64decode(said["data"])


@asynccontextmanager
async def open_browser(width: int = 1280, height: int = 1000) -> AsyncIterator[Tab]:
    """Start a browser of its own with one empty page, and end it afterwards.

    Raises:
        FileNotFoundError: no Chromium is installed.
    """
    program = chromium()
    if program is None:
        raise FileNotFoundError("no Chromium is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        process = await asyncio.create_subprocess_exec(
            program,
            *_FLAGS,
            f"--user-data-dir={home}",
            f"--window-size={width},{height}",
            "about:blank",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(home, "DevToolsActivePort"), process)
            async with _connected(port) as tab:
                yield tab
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    while True:
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        assert process.returncode is None, f"Chromium ended with {process.returncode}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[Tab]:
    async with aiohttp.ClientSession() as client:
        pages: list[dict[str, Any]] = []
        while not pages:
            async with client.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
        async with client.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=2**26) as ws:
            tab = Tab(ws)
            listening = asyncio.create_task(tab.listen())
            try:
                yield tab
            finally:
                listening.cancel()
