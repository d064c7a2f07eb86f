"""The command line: help without heavy imports, one sentence and exit 2 for every mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tomllib

import hexgen_vllm
from hexgen_vllm import cli, doctor
from hexgen_vllm.errors import ConfigError

OF_OTHERS = ("engine", "engine-cpu", "dev", "mutate")  # not for who runs a router
PIPE_CLOSED = 128 + 13
ROOT = Path(__file__).resolve().parents[1]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {path[0]} " in out for path in cli.COMMANDS)
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0
    assert all(f"  {path[1]} " in out for path in cli.COMMANDS if path[0] == "bench")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "hexgen-vllm")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("rooter",), ("unknown command 'rooter'", "router")),
        (("bench", "lvie"), ("hexgen-vllm bench", "unknown command 'lvie'", "live")),
        (("doctor", "--nonsense"), ("hexgen-vllm doctor", "--nonsense")),
        (("doctor", "--jsn"), ("hexgen-vllm doctor", "did you mean --json?")),
        (("sim", "--polcy", "slack"), ("hexgen-vllm sim", "did you mean --policy?")),
        (("calibrat",), ("did you mean 'calibrate'?",)),
        (("bench", "rooter"), ("did you mean 'router'?",)),
    ],
)
def test_mistakes_get_one_sentence_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words)


def test_nothing_given_shows_the_commands_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert "commands:" in out


@pytest.mark.parametrize("path", sorted(cli.COMMANDS))
def test_every_command_exists_and_has_help(
    capsys: pytest.CaptureFixture[str], path: tuple[str, ...]
) -> None:
    module = import_module(cli.COMMANDS[path][0])
    assert callable(module.main)
    code, out, _ = run(capsys, *path, "--help")
    assert code == 0
    assert out.startswith("usage: hexgen-vllm " + " ".join(path))


def test_help_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys\nfrom hexgen_vllm import cli\ncli.main(['--help'])\n"
        "assert not {'torch', 'vllm', 'aiohttp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json", "--wait")
    found = {f["subject"]: f for f in json.loads(out)}
    assert list(found) == [
        "python", "router", "compiled", "vllm", "plugin", "kernels", "compilers", "extras",
    ]  # fmt: skip
    assert code == int(any(f["verdict"] == "broken" for f in found.values()))


def test_doctor_says_what_takes_too_long_to_find_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.0)
    _, out, _ = run(capsys, "doctor", "--json")
    found = {f["subject"]: f["verdict"] for f in json.loads(out)}
    for name in ("vllm", "kernels"):
        there = importlib.util.find_spec({"kernels": "torch"}.get(name, name)) is not None
        assert found[name] == ("unknown" if there else "absent")


def test_a_closed_pipe_is_no_traceback() -> None:
    words = f"{sys.executable} -m hexgen_vllm reference 2>&1 >&3 3>&- | cat"
    shown = subprocess.run(
        ["bash", "-c", f"{{ {words}; }} 3>&1 | head -c 10"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in shown.stdout + shown.stderr
    assert "BrokenPipe" not in shown.stdout + shown.stderr


@pytest.mark.parametrize("words", ["--help", "--version", "explain --help", "nonsense"])
def test_nobody_reads_what_is_printed(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "hexgen_vllm", *words.split()],
        check=False, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert "BrokenPipe" not in found.stderr
    # argparse passes over what it cannot print
    expected = {"nonsense": (2,), "explain --help": (0, PIPE_CLOSED)}
    assert found.returncode in expected.get(words, (PIPE_CLOSED,))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("program", "end", "code"),
    [
        ("hexgen_vllm --help", ">&-", 0),
        ("hexgen_vllm --help", ">/dev/full", 2),
        ("hexgen_vllm tune --help", "", 0),  # it has Greek letters
    ],
)
def test_output_may_be_closed_full_or_poor(program: str, end: str, code: int) -> None:
    line = f"set -o pipefail; {sys.executable} -m {program} {end}"
    found = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
    )
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == (code == 2)


INTERRUPTED = """
import runpy, sys
program, module = sys.argv.pop(1), sys.argv.pop()
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
runpy.run_module(program, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("hexgen_vllm sim", "hexgen_vllm.sim.command"),
        ("hexgen_vllm.router", "hexgen_vllm.router.options"),
        ("hexgen_vllm.serve --cluster x", "hexgen_vllm.cluster.file"),
    ],
)
def test_an_interrupt_while_a_program_is_imported_is_no_traceback(
    program: str, module: str
) -> None:
    line = [sys.executable, "-c", INTERRUPTED, *program.split(), module]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "")


@pytest.mark.parametrize(("value", "named"), [("1", True), ("0", False), ("", False)])
def test_doctor_says_which_server_vllm_would_run(
    monkeypatch: pytest.MonkeyPatch, value: str, named: bool
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    (check,) = (check for check in doctor.CHECKS if check.__name__ == "_vllm")
    found = check()
    assert found.verdict == "ok"
    assert ("Rust server" in found.detail) == named


def test_doctor_names_the_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = (check for check in doctor.CHECKS if check.__name__ == "_extras")
    monkeypatch.setattr(doctor, "EXTRAS", {"a": "pytest", "b": "no-such", "c": "nor-this"})
    assert check() == ("extras", "absent", "b, c; pip install 'hexgen-vllm[b,c]'")
    monkeypatch.setattr(doctor, "EXTRAS", {"a": "pytest"})
    assert check() == ("extras", "ok", "a")


def test_doctor_knows_what_the_package_needs_and_its_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(doctor.NEEDED) == project["dependencies"]
    extras = project["optional-dependencies"]
    optional = {n: needs for n, needs in extras.items() if n not in OF_OTHERS}
    assert list(doctor.EXTRAS) == list(optional)
    assert all(doctor.EXTRAS[name] in needs[0] for name, needs in optional.items())


def test_doctor_calls_the_router_broken_without_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such"))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "router     broken  missing: no-such\n" in out


def test_doctor_fails_when_something_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.Finding("x", "broken", "why"),))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "broken" in out
    assert "why" in out


def test_the_package_can_be_run_as_a_module() -> None:
    words = [sys.executable, "-m", "hexgen_vllm", "--version"]
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    assert ran.stdout == f"hexgen-vllm {hexgen_vllm.__version__}\n"


def test_a_plugin_without_a_vllm_is_not_called_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name)
    )
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    verdicts = {
        finding.subject: finding.verdict for check in doctor.CHECKS for finding in [check()]
    }
    assert verdicts["vllm"] == verdicts["plugin"] == "absent"


def test_what_only_a_clone_has_is_found_by_an_installed_package_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who installed the package from a clone, and is there, is told to go to a clone."""
    clone = tmp_path / "clone"
    for folder in ("hexgen_vllm", "only_in_clones"):
        (clone / folder).mkdir(parents=True)
        (clone / folder / "__init__.py").touch()
    (clone / "only_in_clones" / "command.py").write_text("FOUND = True")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "hexgen_vllm" / "cli.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in (tmp_path, clone / "hexgen_vllm"):
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match="clone"):
            cli._load("only_in_clones.command")
    monkeypatch.chdir(clone)
    try:
        assert cli._load("only_in_clones.command").FOUND
    finally:
        for name in ("only_in_clones.command", "only_in_clones"):
            sys.modules.pop(name, None)
