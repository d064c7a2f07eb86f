"""Comments for clients whose streams are silent, so that nothing in front cuts them off."""

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
    """Streams that clients wait for, or for more of.

    As long as none of it has come, a call stays free to go to any engine: the client has the head
    of an answer and comments. Later they stand between events, where everybody skips them.

    Args:
        interval_s: longest silence towards a client, seconds; 0 sends no comments.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._jobs: dict[int, tuple[Job, float, int]] = {}

    def add(self, job: Job, now: float) -> None:
        """Send comments to the client of ``job`` whenever it hears nothing, from now on."""
        if self._interval_s:
            self._jobs[id(job)] = job, now, 0

    def discard(self, job: Job) -> None:
        """Send no more."""
        self._jobs.pop(id(job), None)

    def tick(self, now: float) -> None:
        """Send the comments that are due."""
        for key, (job, since_s, sent) in list(self._jobs.items()):
            if job.sent != sent:
                self._jobs[key] = job, now, job.sent
            elif job.request.answering and not (job.kept_alive or sent):
                del self._jobs[key]  # it is no stream
            elif now - since_s >= self._interval_s:
                self._jobs[key] = job, now, sent
                _comment(job)


def _comment(job: Job) -> None:
    if job.rests is not None:
        if job.rests():
            job.request.send(COMMENT)
        return
    if job.kept_alive:
        job.request.send(COMMENT)
        return
    job.kept_alive = True
    said = f"{REQUEST_ID_HEADER}: {job.request_id or ''}\r\n".encode()
    job.request.begin(200, [*_HEAD, said], None, COMMENT)
