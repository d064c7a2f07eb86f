"""The container files: every path, option, extra and build command in them is one that there is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import venv
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

import hexgen_vllm
from hexgen_vllm import cli
from hexgen_vllm.router.options import KEY_VARIABLES
from hexgen_vllm.router.routes import public

ROOT = Path(hexgen_vllm.__file__).parents[1]
FILES = sorted((ROOT / "examples/kubernetes").glob("*.Dockerfile"))
COMPOSE = ROOT / "examples/compose/compose.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    said = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, value.strip()) for name, _, value in said]


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


@each_file
def test_an_image_takes_what_there_is_and_what_is_not_left_out(path: Path) -> None:
    said = (ROOT / ".dockerignore").read_text().splitlines()
    taken = {line[1:] for line in said if line.startswith("!")}
    copied = [
        source
        for name, value in instructions(path)
        if name == "COPY" and "--from" not in value
        for source in value.split()[:-1]
    ]
    assert "hexgen_vllm" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in taken, source
    built = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "csrc", "patches"}
    assert built <= set(copied), "setup.py needs them"


def test_no_build_product_gets_into_an_image() -> None:
    said = (ROOT / ".dockerignore").read_text().splitlines()
    left_out = [line.removeprefix("**/") for line in said if line.startswith("**/")]
    for name in ("_lib", "__pycache__", "coordinator.cpython-312-x86_64-linux-gnu.so"):
        assert any(fnmatch(name, pattern) for pattern in left_out), name


@each_file
def test_what_an_image_installs_has_those_extras(path: Path) -> None:
    runs = [value for name, value in instructions(path) if name == "RUN"]
    assert runs
    named = {extra for run in runs for group in re.findall(r"\[([\w,]+)\]", run)
             for extra in group.split(",")}  # fmt: skip
    assert "otel" in named
    assert named <= PROJECT["optional-dependencies"].keys()
    for run in runs:
        words = shlex.split(run)
        set_ = dict(word.split("=", 1) for word in words if re.fullmatch(r"HEXGEN_\w+=\w+", word))
        assert set_.keys() <= {"HEXGEN_COMPILE", "HEXGEN_BUILD_NATIVE"}
        assert set(set_.values()) <= {"0", "1", "auto"}
        assert words[len(set_)] == "pip"


@each_file
def test_an_image_starts_a_command_that_there_is(path: Path) -> None:
    (entry,) = (value for name, value in instructions(path) if name == "ENTRYPOINT")
    words = yaml.safe_load(entry)
    if words[0] == "hexgen-vllm":
        assert tuple(words[1:]) in cli.COMMANDS
        assert PROJECT["scripts"]["hexgen-vllm"] == "hexgen_vllm.cli:main"
    else:
        assert words[:2] == ["python3", "-m"]
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists()


def test_compose_gives_the_router_its_engines() -> None:
    services = compose()["services"]
    engines = {f"http://{name}:8000" for name in services if name.startswith("engine-")}
    command = services["router"]["command"]
    assert set(command[command.index("--worker-urls") + 1 :]) == engines
    _, parser = cli.command(("router",))
    args = parser.parse_args(command)
    assert set(args.worker_urls) == engines
    assert set(services["router"]["environment"]) == set(KEY_VARIABLES.values())


def test_compose_gives_each_engine_a_gpu_of_its_own() -> None:
    services = compose()["services"]
    gpus = [
        device["device_ids"][0]
        for name, service in services.items()
        if name.startswith("engine-")
        for device in service["deploy"]["resources"]["reservations"]["devices"]
    ]
    assert len(gpus) == len(set(gpus)) == 2


def test_compose_builds_what_there_is_and_asks_for_pages_that_there_are() -> None:
    pages = {route.path for route in public()}
    for service in compose()["services"].values():
        build = service["build"]
        folder = (COMPOSE.parent / build["context"]).resolve()
        assert folder == ROOT
        assert (folder / build["dockerfile"]).exists()
        (asked,) = re.findall(r"http://127.0.0.1:\d+(/\w+)", service["healthcheck"]["test"][-1])
        assert asked in pages
        assert f":{hexgen_vllm.__version__}" in service["image"]


@each_file
def test_the_linter_of_container_files_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), path],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def within(root: Path, text: str) -> str:
    """Return ``text`` with the absolute paths of an image as those of a folder."""
    return re.sub(r"(?<![\w.])/(src|wheels)\b", rf"{root}/\1", text)


@each_file
def test_every_command_of_an_image_runs(path: Path, tmp_path: Path) -> None:
    """In an environment of its own, on what is installed here, and without compiling."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "here.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    bin_ = tmp_path / "env" / "bin"
    (bin_ / "pip").write_text(f'#!/bin/sh\nexec {bin_}/python -m pip "$@"\n')
    (bin_ / "pip").chmod(0o755)
    env = {
        "PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path), "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    ran = 0
    folder = tmp_path
    for name, value in instructions(path):
        if name == "WORKDIR":
            folder = Path(within(tmp_path, value)) if value != "/" else tmp_path
            folder.mkdir(exist_ok=True)
        elif name == "COPY" and "--from" not in value:
            *sources, to = value.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, folder / to if to != "./" else folder / source)
        elif name == "RUN":
            line = re.sub(r"HEXGEN_(COMPILE|BUILD_NATIVE)=\w+", r"HEXGEN_\1=0", value)
            line = within(tmp_path, line)
            done = subprocess.run(
                ["sh", "-ec", line], cwd=folder, env=env, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            ran += 1
    assert ran == sum(name == "RUN" for name, _ in instructions(path)) > 0
    assert (bin_ / "hexgen-vllm").exists()
    (entry,) = (yaml.safe_load(value) for name, value in instructions(path) if name == "ENTRYPOINT")
    if entry[0] == "hexgen-vllm":
        shown = subprocess.run(
            [*entry, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        assert "--worker-urls" in shown.stdout
    places = subprocess.run(
        [bin_ / "python", "-c", "import hexgen_vllm; print(hexgen_vllm.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert places.stdout.startswith(str(site)), "it is the package of the image"
