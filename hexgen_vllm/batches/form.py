"""Reads a form with a file as it arrives: the file goes on in pieces, nothing of it is kept."""

from __future__ import annotations

import re
from typing import Final

from hexgen_vllm.errors import BadRequest

_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]{1,200})"|([^\s;,"]{1,200}))', re.I)
_NAME: Final = re.compile(r'(?:^|[\s;])name=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.I)
_FILENAME: Final = re.compile(r'(?:^|[\s;])filename=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.I)
_MAX_HEAD_BYTES: Final = 16 * 1024
_MAX_VALUE_BYTES: Final = 16 * 1024
_MAX_PARTS: Final = 64


class FormReader:
    """One ``multipart/form-data`` body.

    Attributes:
        fields: values of the fields that are no file.
        filename: what the client calls the file, ``None`` before it came.
        complete: whether the form has ended.

    Args:
        content_type: of the request.

    Raises:
        BadRequest: it is no such form.
    """

    def __init__(self, content_type: str) -> None:
        found = _BOUNDARY.search(content_type)
        if not content_type.lower().startswith("multipart/form-data") or found is None:
            raise BadRequest("The body must be a form with a file (multipart/form-data).")
        boundary = found[1] or found[2]
        self._mark = b"\r\n--" + boundary.encode("utf-8", "surrogateescape")
        self._rest = b"\r\n"  # as if something stood before the first part
        self._read = self._in_part
        self._part: str | None = None  # name of the field that is read
        self._in_file = False
        self._value = bytearray()
        self._parts = 0
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take in a piece of the body; return what it brings of the file.

        Raises:
            BadRequest: it is no form.
        """
        self._rest += piece
        found: list[bytes] = []
        while not self.complete and self._read(found):
            pass
        if self.complete:
            self._rest = b""  # what follows a form is nobody's
        return found

    def _in_part(self, found: list[bytes]) -> bool:
        end = self._rest.find(self._mark)
        ended = end >= 0
        if not ended:  # the beginning of a mark may be there
            end = max(len(self._rest) - len(self._mark) + 1, 0)
        self._take(self._rest[:end], found)
        self._rest = self._rest[end:]
        if ended:
            self._rest = self._rest[len(self._mark) :]
            self._end_part()
            self._read = self._behind_mark
        return ended

    def _take(self, data: bytes, found: list[bytes]) -> None:
        if self._in_file:
            if data:
                found.append(data)
        elif self._part is not None:
            self._value += data
            if len(self._value) > _MAX_VALUE_BYTES:
                raise BadRequest(f"The field {self._part} is too long.", param=self._part)

    def _end_part(self) -> None:
        if self._part is not None and not self._in_file:
            self.fields[self._part] = self._value.decode("utf-8", "replace")
        self._part, self._in_file = None, False
        self._value.clear()

    def _behind_mark(self, found: list[bytes]) -> bool:
        if len(self._rest) < 2:
            return False
        if self._rest.startswith(b"--"):
            self.complete = True
            return True
        end = self._rest.find(b"\r\n")
        if end < 0:
            self._bound(self._rest)
            return False
        if self._rest[:end].strip(b" \t"):
            raise _broken()
        self._rest = self._rest[end:]  # a part without headers ends with the same line
        self._read = self._in_head
        return True

    def _in_head(self, found: list[bytes]) -> bool:
        end = self._rest.find(b"\r\n\r\n")
        if end < 0:
            self._bound(self._rest)
            return False
        self._bound(self._rest[:end])
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise BadRequest("The form has too many parts.")
        self._begin_part(self._rest[:end].decode("utf-8", "replace"))
        self._rest = self._rest[end + 4 :]
        self._read = self._in_part
        return True

    def _begin_part(self, head: str) -> None:
        lines = [line for line in head.split("\r\n") if line.strip()]
        said = next((x for x in lines if x.lower().startswith("content-disposition:")), "")
        name, filename = _NAME.search(said), _FILENAME.search(said)
        self._part = "" if name is None else _unquoted(name)
        if self._part == "file":
            if self.filename is not None:
                raise BadRequest("The form must have one file.", param="file")
            self._in_file = True
            self.filename = "file" if filename is None else _unquoted(filename)

    @staticmethod
    def _bound(head: bytes) -> None:
        if len(head) > _MAX_HEAD_BYTES:
            raise _broken()


def _unquoted(found: re.Match[str]) -> str:
    return re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else found[2]


def _broken() -> BadRequest:
    return BadRequest("The body is not a valid form.")
