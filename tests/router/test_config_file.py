"""Options from a file, from the environment and from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.main import add_arguments, options_from
from hexgen_vllm.router.options import RouterOptions

URL = "http://10.0.0.1:8000"


def read(
    line: str, environment: dict[str, str] | None = None
) -> tuple[RouterOptions, DispatchOptions]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(line.split()), environment or {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "router.yaml"
    path.write_text(f"""
worker-urls: [fast={URL}, http://10.0.0.2:8000]
policy: paper
alpha: 0.5
api_key: from-file
queue-size: 7
tenant-weights: {{batch: 0.5}}
disable-retries: true
""")
    return path


def test_a_file_gives_options_of_both_kinds(file: Path) -> None:
    options, dispatch = read(f"--config {file}")
    assert [worker.name for worker in options.workers()] == ["fast", "engine-1"]
    assert (options.api_key, options.queue_size, options.disable_retries) == (
        ("from-file",), 7, True,
    )  # fmt: skip
    assert (dispatch.policy, dispatch.alpha) == ("paper", 0.5)
    assert dispatch.tenant_weights == {"batch": 0.5}


def test_the_command_line_goes_first_and_the_environment_second(file: Path) -> None:
    keys = {"HEXGEN_ROUTER_API_KEY": "from-env", "HEXGEN_ROUTER_ADMIN_API_KEY": "admin",
            "HEXGEN_ROUTER_ENGINE_API_KEY": "inner"}  # fmt: skip
    options, dispatch = read(f"--config {file} --alpha 0.9 --queue-size 8", keys)
    assert (options.api_key, options.admin_api_key, options.engine_api_key) == (
        ("from-env",), ("admin",), "inner",
    )  # fmt: skip
    assert (dispatch.alpha, options.queue_size) == (0.9, 8)
    options, _ = read(f"--config {file} --api-key a b", keys)
    assert options.api_key == ("a", "b")
    options, _ = read(f"--worker-urls {URL}", {"HEXGEN_ROUTER_API_KEY": ""})
    assert options.api_key == ()


@pytest.mark.parametrize("words", ["a=2 b=0.5", '{"a":2,"b":0.5}'])
def test_weights_of_tenants_have_a_flag(words: str) -> None:
    _, dispatch = read(f"--worker-urls {URL} --fair-window-tokens 1000 --tenant-weights {words}")
    assert dispatch.tenant_weights == {"a": 2.0, "b": 0.5}
    assert dispatch.fair_window_tokens == 1000


@pytest.mark.parametrize("words", ["a", "a=x", "a=-1", "a=nan", '{"a":"x"}', '{"a":'])
def test_wrong_weights_are_named(words: str) -> None:
    with pytest.raises(ConfigError, match="tenant_weights"):
        read(f"--worker-urls {URL} --tenant-weights {words}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("policy: slack\nnonsense: 1", "line 2: unknown option 'nonsense'"),
        ("\nalpha: 2", "line 2: alpha must be at most 1"),
        ("worker-urls: [7]", "line 1: worker_urls must be text or a list of texts"),
        ("worker-urls: nowhere", "line 1: worker_urls must be like"),
        ("policy: slack\nqueue-size: many", "line 2: queue-size must be a number, not 'many'"),
        ("policy:\nalpha: 0.1", "line 1: policy must be text, not None"),
        ("host: 2026-01-01", "line 1: host must be text"),
        ("port: 1\nbeta: 1e-2\nalhpa: 1", r"line 3: .*did you mean 'alpha'"),
        ("tenant-weights: {a: x}", "line 1: tenant-weights must be a mapping of names to numbers"),
        ("- a", "must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read(f"--config {path}")


def test_a_number_may_be_written_as_other_programs_write_it(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("alpha: 1e-1\nqueue-size: 2e2\n")
    options, dispatch = read(f"--config {path} --worker-urls {URL}")
    assert (dispatch.alpha, options.queue_size) == (0.1, 200)


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert read(f"--config {path} --worker-urls {URL}")[0].worker_urls == (URL,)


def test_options_that_need_each_other_may_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("selector: [app=engine]\nservice-discovery: true\n")
    options, _ = read(f"--config {path}")
    assert (options.service_discovery, options.selector) == (True, ("app=engine",))
    path.write_text("port: 1\nselector: [app=engine]\n")
    with pytest.raises(ConfigError, match="line 2: service_discovery and selector must be given"):
        read(f"--config {path}")


@pytest.mark.parametrize("name", ["{}", "{}:Third"])
def test_a_policy_file_without_such_a_class_says_which_it_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class First:\n    def choose(self, *given): ...\nclass Other: ...\n")
    with pytest.raises(ConfigError, match=r"it has First\.$"):
        read(f"--policy {name.format(path)}")
