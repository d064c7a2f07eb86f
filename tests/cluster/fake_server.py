"""A server with a health check and nothing else, in the modes that the tests need.

    python fake_server.py HOST PORT [MODE]

Modes: ``ok``; ``dies`` before it listens; ``stubborn`` ignores SIGTERM; ``parent`` has a child of
its own that ignores SIGTERM. ``POST /die`` ends it with code 7, ``GET /pids`` names its processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
pids = [os.getpid()]


class Handler(BaseHTTPRequestHandler):
    """Answers the three paths."""

    def do_GET(self) -> None:
        body = json.dumps({"pids": pids, "word": os.environ.get("FAKE_WORD")}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        print("asked to die", flush=True)
        os._exit(7)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


def main() -> None:
    """Serve as the command line says."""
    host, port, *mode = sys.argv[1:]
    if mode == ["dies"]:
        print("first line\nno luck today")
        sys.exit(3)
    if mode == ["stubborn"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == ["parent"]:
        pids.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", SLEEPER]).pid)
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
