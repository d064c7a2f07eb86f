"""Our words on a command line like vLLM's; ``tests/e2e`` has them on the real one."""

from __future__ import annotations

import argparse
import json
import socket
from typing import Any

import pytest

from hexgen_vllm.engine.options import SCHEDULER, options_of
from hexgen_vllm.engine.server import arguments
from hexgen_vllm.engine.server.arguments import MIDDLEWARE
from hexgen_vllm.errors import ConfigError, UnsupportedVLLM
from hexgen_vllm.ports import free_ports


class Ours:
    """Has what our scheduler and classes made from it have."""

    hexgen_stats = None


class Theirs:
    """A scheduler of somebody else."""


OURS = f"{__name__}.Ours"
THEIRS = f"{__name__}.Theirs"


def parser(*, by_default: bool = False, refusal: str | None = None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vllm serve")
    made.add_argument("--scheduling-policy", choices=["fcfs", "priority"], default="fcfs", help="")
    made.add_argument("--scheduler-cls")
    made.add_argument("--additional-config", type=json.loads, default={})
    made.add_argument("--middleware", action="append", default=[])
    made.add_argument("--port", type=int, default=8000)
    arguments.extend(made, by_default=by_default, refusal=refusal)
    return made


def parse(*words: str, **how: Any) -> dict[str, Any]:
    found = vars(parser(**how).parse_args(words))
    names = ("scheduling_policy", "scheduler_cls", "additional_config", "middleware")
    return {name: found[name] for name in names}


STOCK: dict[str, Any] = {
    "scheduling_policy": "fcfs",
    "scheduler_cls": None,
    "additional_config": {},
    "middleware": [],
}
URGENT = {
    "scheduling_policy": "fcfs",
    "scheduler_cls": SCHEDULER,
    "additional_config": {"hexgen": {}},
    "middleware": [MIDDLEWARE],
}


@pytest.mark.parametrize(
    "words", [(), ("--scheduling-policy=priority",), (f"--scheduler-cls={THEIRS}",)]
)
def test_who_does_not_ask_for_us_gets_plain_vllm(words: tuple[str, ...]) -> None:
    found = parse(*words)
    assert found["additional_config"] == {}
    assert found["middleware"] == []
    assert MIDDLEWARE not in str(found)


@pytest.mark.parametrize(
    "words", [("--scheduling-policy", "urgency"), ("--scheduler-cls", SCHEDULER)]
)
def test_urgency_becomes_arguments_of_plain_vllm(words: tuple[str, ...]) -> None:
    assert parse(*words) == URGENT


def test_urgency_can_be_the_default() -> None:
    assert parse(by_default=True) == URGENT


@pytest.mark.parametrize(
    ("words", "policy", "scheduler"),
    [
        (("--scheduling-policy=fcfs",), "fcfs", None),
        (("--scheduling-policy=priority",), "priority", None),
        ((f"--scheduler-cls={THEIRS}",), "fcfs", THEIRS),
    ],
)
def test_the_default_can_be_overridden(
    words: tuple[str, ...], policy: str, scheduler: str | None
) -> None:
    wanted = {**STOCK, "scheduling_policy": policy, "scheduler_cls": scheduler}
    assert parse(*words, by_default=True) == wanted


def test_a_scheduler_made_from_ours_counts_as_ours() -> None:
    assert parse(f"--scheduler-cls={OURS}") == {**URGENT, "scheduler_cls": OURS}


def test_a_scheduler_that_cannot_be_imported_is_vllms_to_refuse() -> None:
    assert parse("--scheduler-cls=no.such.Thing")["scheduler_cls"] == "no.such.Thing"
    assert parse("--scheduler-cls=nodots")["scheduler_cls"] == "nodots"


def test_options_of_both_kinds_are_merged_and_flags_win() -> None:
    found = parse(
        "--scheduling-policy=urgency",
        "--hexgen-order=edf",
        "--no-hexgen-displace",
        '--additional-config={"hexgen": {"order": "fcfs", "max_displacements": 1}, "other": 2}',
    )
    assert found["additional_config"] == {
        "hexgen": {"order": "edf", "max_displacements": 1, "displace": False},
        "other": 2,
    }


def test_an_order_by_its_earlier_name_is_handed_on_by_todays() -> None:
    said = '--additional-config={"hexgen": {"order": "hexgen"}}'
    by_file = parse("--scheduling-policy=urgency", said)
    by_flag = parse("--scheduling-policy=urgency", "--hexgen-order=hexgen")
    assert by_file["additional_config"] == {"hexgen": {"order": "paper"}}
    assert by_flag == by_file
    config = argparse.Namespace(additional_config={"hexgen": {"order": "hexgen", "pace": False}})
    config.kv_transfer_config = None
    assert options_of(config).order == "paper"


def test_defaults_of_the_parser_are_not_written_to() -> None:
    made = parser()
    made.parse_args(["--scheduling-policy=urgency", "--hexgen-order=edf"])
    assert made.parse_args([]).additional_config == {}
    assert made.parse_args([]).middleware == []


def test_the_middleware_is_there_once_and_after_the_users() -> None:
    words = ("--scheduling-policy=urgency", "--middleware=a.B")
    assert parse(*words)["middleware"] == ["a.B", MIDDLEWARE]
    assert parse(*words, f"--middleware={MIDDLEWARE}")["middleware"] == ["a.B", MIDDLEWARE]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--scheduling-policy=urgency", f"--scheduler-cls={THEIRS}"),
            f"--scheduling-policy urgency and --scheduler-cls {THEIRS} exclude each other.",
        ),
        (("--hexgen-order=edf",), "--hexgen-order needs --scheduling-policy urgency."),
        (
            ("--scheduling-policy=urgency", "--hexgen-default-deadline-s=0"),
            "default_deadline_s must be at least 0.001, not 0.",
        ),
        (
            ("--scheduling-policy=urgency", '--additional-config={"hexgen": {"ordr": 1}}'),
            "unknown hexgen option 'ordr'; known are ",
        ),
        (
            (f"--scheduler-cls={SCHEDULER}", '--additional-config={"hexgen": [1]}'),
            "additional_config.hexgen must be a mapping, not [1].",
        ),
        (("--scheduling-policy=urgency", "--hexgen-ordr=1"), "unknown option --hexgen-ordr; kn"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vllm serve: {sentence}")
    assert said.count("\n") == 1


def test_a_vllm_that_cannot_be_driven_refuses_only_who_asks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse(refusal="Too old.") == STOCK
    with pytest.raises(SystemExit):
        parse("--scheduling-policy=urgency", refusal="Too old.")
    assert capsys.readouterr().err == "vllm serve: Too old.\n"


def test_the_help_has_our_group_with_every_default_once() -> None:
    text = " ".join(parser(by_default=True).format_help().split())
    assert "hexgen: Options of urgency scheduling" in text
    assert "--hexgen-order {due,slack,paper,edf,fcfs" in text
    assert "edf or fcfs (default: due)" in text
    assert "--cluster FILE" in text
    assert "default: None" not in text


def engine_args(**values: Any) -> argparse.Namespace:
    plain: dict[str, Any] = {
        "scheduling_policy": "fcfs",
        "scheduler_cls": None,
        "additional_config": {},
    }
    return argparse.Namespace(**{**plain, **values})


def test_arguments_made_in_python_are_resolved_too() -> None:
    target = engine_args(scheduling_policy="urgency")
    arguments.resolve(target)
    arguments.resolve(target)
    assert vars(target) == {name: URGENT[name] for name in vars(target)}


def test_a_class_of_ours_stays_the_class() -> None:
    target = engine_args(scheduler_cls=Ours, additional_config={"hexgen": {"order": "edf"}})
    arguments.resolve(target)
    assert target.scheduler_cls is Ours
    assert target.additional_config == {"hexgen": {"order": "edf"}}


def test_wrong_arguments_made_in_python_are_errors() -> None:
    with pytest.raises(ConfigError, match="additional_config must be a mapping"):
        arguments.resolve(engine_args(scheduler_cls=Ours, additional_config="x"))
    with pytest.raises(UnsupportedVLLM, match="Too old"):
        arguments.resolve(engine_args(scheduler_cls=Ours), refusal="Too old.")


@pytest.mark.engine
def test_host_memory_for_kv_brings_our_connector() -> None:
    target = engine_args(
        scheduling_policy="urgency",
        additional_config={"hexgen": {"host_kv_gib": 0.5}},
        kv_transfer_config=None,
    )
    arguments.resolve(target)
    assert target.kv_transfer_config.kv_connector == "HostKVConnector"
    target.kv_transfer_config = {"kv_connector": "SomethingElse"}
    with pytest.raises(ConfigError, match=r"another KV connector \(SomethingElse\)"):
        arguments.resolve(target)


@pytest.mark.parametrize(("value", "added"), [("1", False), ("0", True), ("", True), (None, True)])
def test_the_rust_server_gets_no_middleware(
    monkeypatch: pytest.MonkeyPatch, value: str | None, added: bool
) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    found = parse("--scheduling-policy", "urgency")
    assert found["scheduler_cls"] == SCHEDULER
    assert (MIDDLEWARE in found["middleware"]) == added


def telemetry(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = parse("--scheduling-policy", "urgency", *words)["additional_config"]
    return {name: value for name, value in found["hexgen"].items() if name.startswith("stats_")}


def test_with_the_rust_server_telemetry_is_where_the_router_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    # vLLM's loggers hand nothing on to pytest's.
    monkeypatch.setattr(arguments.logger, "warning", lambda text, *args: warned.append(text % args))
    (beside,) = free_ports("127.0.0.1", 1)
    words = ("--port", str(beside - 10000))
    assert telemetry(*words) == {}
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert telemetry(*words) == {"stats_port": beside}
    assert telemetry(*words, "--hexgen-stats-port", "0") == {"stats_port": 0}
    assert telemetry(*words, "--hexgen-stats-port", "8100") == {"stats_port": 8100}
    assert not warned
    with socket.socket() as other:  # whatever has the port, the engine starts
        other.bind(("127.0.0.1", beside))
        other.listen()
        assert telemetry(*words) == {}
    assert telemetry("--port", "60000") == {}
    assert len(warned) == 2
