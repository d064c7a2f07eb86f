"""Comments for clients whose streams have not begun, so that nothing in front cuts them off."""

from __future__ import annotations

from typing import Final

from hexgen_vllm.router.calls.call import Job
from hexgen_vllm.router.http.messages import REQUEST_ID_HEADER, SERVER

COMMENT: Final = b": keep-alive\n\n"
_HEAD: Final = (
    b"Content-Type: text/event-stream; charset=utf-8\r\n",
    b"Cache-Control: no-cache\r\n",
    f"Server: {SERVER}\r\n".encode(),
)


class KeepAlives:
    """Streams that have not begun.

    A call stays free to go to any engine: the client has the head of an answer and comments, and
    no part of the answer.

    Args:
        interval_s: time between two comments, seconds; 0 sends none.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._jobs: dict[int, tuple[Job, float]] = {}

    def add(self, job: Job, now: float) -> None:
        """Send comments to the client of ``job`` from now on, until its answer begins."""
        if self._interval_s:
            self._jobs[id(job)] = job, now

    def discard(self, job: Job) -> None:
        """Send no more."""
        self._jobs.pop(id(job), None)

    def tick(self, now: float) -> None:
        """Send the comments that are due."""
        for key, (job, since_s) in list(self._jobs.items()):
            if job.sent or (job.request.answering and not job.kept_alive):
                del self._jobs[key]
            elif now - since_s >= self._interval_s:
                self._jobs[key] = job, now
                _comment(job)


def _comment(job: Job) -> None:
    if job.kept_alive:
        job.request.send(COMMENT)
        return
    job.kept_alive = True
    said = f"{REQUEST_ID_HEADER}: {job.request_id or ''}\r\n".encode()
    job.request.begin(200, [*_HEAD, said], None, COMMENT)
