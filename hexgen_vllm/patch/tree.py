"""The installed vLLM as files: its version, its patches, and how they are applied and reverted.

vLLM is not imported: a patch may be what it needs, and a broken one must not stand in the way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.patch import diff

_VERSION = re.compile(r"""^__version__ = .*?['"](\d+\.\d+)[^'"]*['"]""", re.MULTILINE)
APPLIED, ABSENT, FOREIGN = "applied", "not applied", "does not fit"


@dataclass(frozen=True)
class Patch:
    """One patch for the vLLM at hand.

    Attributes:
        name: its file's name without the suffix.
        files: its hunks by path, relative to the folder that holds the package ``vllm``.
    """

    name: str
    files: Mapping[str, tuple[diff.Hunk, ...]]

    @property
    def suffix(self) -> str:
        """Ending of the files as they were before it, which lie beside the patched ones."""
        return f".before-{self.name}"


class Tree:
    """The package ``vllm`` in one place.

    Args:
        package: its folder; by default that of the vLLM which Python would import.
        patches: folder of patches; by default those of this package.

    Raises:
        ConfigError: there is no vLLM, or its version is not to be found.
    """

    def __init__(self, package: Path | None = None, patches: Path | None = None) -> None:
        self.package = installed() if package is None else package
        self.version = _version(self.package)
        self._patches = bundled() if patches is None else patches

    def patches(self) -> list[Patch]:
        """Return the patches for this version, in the order in which they are applied."""
        found = sorted(self._patches.glob(f"*/vllm-{self.version}.patch"))
        return [Patch(path.parent.name, diff.parse(path.read_text())) for path in found]

    def status(self, patch: Patch) -> str:
        """Return ``applied``, ``not applied`` or ``does not fit``."""
        texts = {name: self._read(name) for name in patch.files}
        if all(diff.fits(texts[name], hunks) for name, hunks in patch.files.items()):
            return ABSENT
        back = {name: diff.reverse(hunks) for name, hunks in patch.files.items()}
        fits = all(diff.fits(texts[name], hunks) for name, hunks in back.items())
        return APPLIED if fits else FOREIGN

    def apply(self, patch: Patch) -> None:
        """Apply a patch, all of it or nothing; the files as they were stay beside the new ones.

        Raises:
            ConfigError: it does not fit, or a file cannot be written.
        """
        changed = self._changed(patch, patch.files)
        for name in changed:
            _write(self._path(name + patch.suffix), self._read(name))
        self._write_all(changed)

    def revert(self, patch: Patch) -> None:
        """Take a patch back, all of it or nothing.

        Raises:
            ConfigError: the files are neither as it left them, or one cannot be written.
        """
        back = {name: diff.reverse(hunks) for name, hunks in patch.files.items()}
        changed = self._changed(patch, back)
        self._write_all(changed)
        for name, text in changed.items():
            backup = self._path(name + patch.suffix)
            if backup.exists() and backup.read_text() == text:
                backup.unlink()

    def _changed(self, patch: Patch, files: Mapping[str, tuple[diff.Hunk, ...]]) -> dict[str, str]:
        """Return the new texts: the dry run that comes before anything is written."""
        changed = {}
        for name, hunks in files.items():
            try:
                changed[name] = diff.apply(self._read(name), hunks)
            except diff.MismatchError as error:
                raise ConfigError(
                    f"patch {patch.name} does not fit {self._path(name)}: {error}"
                ) from None
        return changed

    def _write_all(self, texts: Mapping[str, str]) -> None:
        before = {name: self._read(name) for name in texts}
        try:
            for name, text in texts.items():
                _write(self._path(name), text)
        except ConfigError:
            for name, text in before.items():
                with suppress(ConfigError):
                    _write(self._path(name), text)
            raise

    def _path(self, name: str) -> Path:
        return self.package.parent / name

    def _read(self, name: str) -> str:
        try:
            return self._path(name).read_text(encoding="utf-8")
        except OSError:
            return ""  # no hunk fits


def installed() -> Path:
    """Return the folder of the vLLM that Python would import.

    Raises:
        ConfigError: there is none.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError("vLLM is not installed, so there is nothing to patch.")
    return Path(spec.origin).parent


def bundled() -> Path:
    """Return the folder of our patches: in the package when installed, else in the source tree."""
    here = Path(__file__).resolve().parent
    packaged = here / "files"
    return packaged if packaged.is_dir() else here.parents[1] / "patches"


def _version(package: Path) -> str:
    """Return ``major.minor`` of a vLLM without importing it."""
    path = package / "_version.py"
    found = _VERSION.search(path.read_text()) if path.is_file() else None
    if found is None:
        raise ConfigError(f"{package} is no installed vLLM: its _version.py tells no version.")
    return found[1]


def _write(path: Path, text: str) -> None:
    """Write a file so that whoever reads it meanwhile sees the old or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        if path.exists():
            draft.chmod(path.stat().st_mode)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
