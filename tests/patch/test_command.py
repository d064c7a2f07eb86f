"""``hexgen-vllm patch`` on made-up installations that our patches fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.cli import main
from hexgen_vllm.patch import diff
from hexgen_vllm.patch.tree import bundled

PATCHES = sorted(bundled().glob("*/vllm-*.patch"))
NAME = "0001-connector-learns-of-preemption"
BACKUP_SUFFIX = f".before-{NAME}"
SUPPORTED = [f"0.{minor}" for minor in range(28, 34)]


def install(folder: Path, version: str) -> Path:
    """Write as much of a vLLM as the patches look at."""
    package = folder / "vllm"
    package.mkdir()
    (package / "_version.py").write_text(f"__version__ = version = '{version}.0+cpu'\n")
    for path in PATCHES:
        if path.stem == f"vllm-{version}":
            for name, hunks in diff.parse(path.read_text()).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("".join(f"#\n{''.join(h.old)}" for h in hunks))
    return package


def files(package: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in package.rglob("*") if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], package: Path, action: str) -> tuple[int, str]:
    code = main(["patch", action, "--vllm", str(package)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_there_is_a_patch_for_every_version() -> None:
    assert [path.stem for path in PATCHES] == [f"vllm-{version}" for version in SUPPORTED]


@pytest.mark.parametrize("version", SUPPORTED)
def test_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path, version: str) -> None:
    package = install(tmp_path, version)
    before = files(package)
    assert run(capsys, package, "status") == (
        0,
        f"vLLM {version} in {package}\n  {NAME}: not applied\n",
    )
    assert files(package) == before, "looking changes nothing"
    for hint in (f"end in {BACKUP_SUFFIX}. Restart", ""):  # the second time changes nothing
        code, said = run(capsys, package, "apply")
        assert code == 0
        assert said.endswith(f"  {NAME}: applied\n")
        assert hint in said
    kept = {path: text for path, text in files(package).items() if BACKUP_SUFFIX in path.name}
    assert kept == {
        path.with_name(path.name + BACKUP_SUFFIX): text
        for path, text in before.items()
        if path.name != "_version.py"
    }
    for _ in range(2):
        assert run(capsys, package, "revert")[0] == 0
        assert files(package) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_what_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str
) -> None:
    package = install(tmp_path, "0.32")
    path = package / "v1" / "core" / "sched" / "scheduler.py"
    path.write_text(path.read_text().replace("assert", "Assert"))
    before = files(package)
    code, said = run(capsys, package, action)
    assert code == 2
    assert said.endswith(
        f"hexgen-vllm patch: patch {NAME} does not fit this vLLM 0.32; nothing was changed.\n"
    )
    assert files(package) == before
    assert "does not fit" in run(capsys, package, "status")[1]


def test_a_change_of_others_survives_a_revert(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    package = install(tmp_path, "0.32")
    run(capsys, package, "apply")
    path = package / "v1" / "core" / "sched" / "scheduler.py"
    path.write_text(path.read_text() + "# of others\n")
    assert run(capsys, package, "revert")[0] == 0
    assert path.read_text().endswith("# of others\n")
    assert path.with_name(path.name + BACKUP_SUFFIX).exists(), "it is no longer the same"


def test_all_or_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install(tmp_path, "0.32")
    before = files(package)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name == "scheduler.py":
            raise OSError(30, "Read-only file system")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    code, said = run(capsys, package, "apply")
    assert (code, "scheduler.py cannot be written: Read-only file system." in said) == (2, True)
    now = files(package)
    assert {path: text for path, text in now.items() if BACKUP_SUFFIX not in path.name} == before


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("9.9", "there is no patch for vLLM 9.9, and none is needed."),
        (None, "is no installed vLLM: its _version.py tells no version."),
    ],
)
def test_no_vllm_to_patch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, version: str | None, says: str
) -> None:
    package = install(tmp_path, version) if version else tmp_path
    code, said = run(capsys, package, "apply")
    assert code == 2
    assert says in said
