"""Whose rules ours stands for: those of the class that vLLM itself would take, or it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.engine.headless import (
    Setup,
    build_scheduler,
    vllm_config,
)
from hexgen_vllm.engine import compat
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.engine.server import arguments
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.pace import PacedScheduler, PacedUrgencyScheduler
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import expected


class Mine(UrgencyScheduler):
    """A scheduler that a user made from ours."""


OURS = [UrgencyScheduler, Mine, PacedScheduler, PacedUrgencyScheduler]


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("overlapping", [False, True])
def test_an_engine_overlaps_steps_exactly_where_vllm_does(
    folder: Path, cls: type, pipeline: int, overlapping: bool
) -> None:
    setup = Setup(blocks=24, async_scheduling=overlapping, pipeline=pipeline)
    scheduler = build_scheduler(cls, folder, setup)
    assert isinstance(scheduler, cls)
    assert isinstance(scheduler, AsyncScheduler) == overlapping
    assert type(scheduler).__name__ == cls.__name__


def test_both_kinds_live_in_one_process(folder: Path) -> None:
    kinds = [
        isinstance(build_scheduler(Mine, folder, Setup(24, async_scheduling=a)), AsyncScheduler)
        for a in (True, False, True)
    ]
    assert kinds == [True, False, True]


@pytest.mark.parametrize("v2_runner", [False, True])
def test_no_decode_is_scheduled_before_its_input_token_exists(
    build: Build, v2_runner: bool
) -> None:
    second = {}
    for cls in (Scheduler, UrgencyScheduler):
        engine = build(cls, pipeline=2, v2_runner=v2_runner)
        engine.add("r", [5] * 10, 4)
        engine.scheduler.schedule()
        second[cls] = engine.scheduler.schedule().num_scheduled_tokens
    assert second[UrgencyScheduler] == second[Scheduler] == {}


@pytest.mark.parametrize("pipeline", [1, 2])
def test_without_overlap_drafts_are_those_that_the_engine_was_given(
    build: Build, pipeline: int
) -> None:
    """AsyncScheduler makes up drafts of -1; without overlap nobody replaces them in time."""
    engine = build(pipeline=pipeline)
    engine.scheduler.num_spec_tokens = engine.scheduler.num_lookahead_tokens = 2
    request = engine.add("r", [5] * 10, 8)
    engine.step()
    assert list(request.spec_token_ids) == []
    engine.run()
    assert engine.tokens["r"] == expected([5] * 10, 8)


def with_model(folder: Path, **facts: Any) -> Any:
    config = vllm_config(folder, Setup(blocks=24))
    changed = copy.copy(config)
    changed.model_config = SimpleNamespace(**{"is_diffusion": False, **facts})
    return changed


class Theirs(Scheduler):
    """A class that vLLM might give a model of its own."""


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(
    ("facts", "named"),
    [({"is_diffusion": True}, "diffusion"), ({"is_encoder_decoder": True}, "encoder-decoder")],
)
def test_models_with_rules_of_their_own_are_refused(
    folder: Path, cls: type, facts: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        cls(vllm_config=with_model(folder, **facts))
    assert "\n" not in str(error.value)


def test_a_diffusion_config_is_refused(folder: Path) -> None:
    config = with_model(folder)
    config.diffusion_config = SimpleNamespace(canvas_length=8)
    with pytest.raises(ConfigError, match="diffusion"):
        UrgencyScheduler(vllm_config=config)


def test_another_class_of_vllm_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vllm_config(folder, Setup(blocks=24))
    monkeypatch.setattr(SchedulerConfig, "get_scheduler_cls", lambda self: Theirs)
    with pytest.raises(ConfigError, match="Theirs"):
        UrgencyScheduler(vllm_config=config)


def test_a_class_that_vllm_chose_for_a_model_is_not_replaced(folder: Path) -> None:
    config = vllm_config(folder, Setup(blocks=24))
    config.scheduler_config.scheduler_cls = "vllm.somewhere.OtherScheduler"
    with pytest.raises(ConfigError, match="OtherScheduler"):
        arguments.take_place(config, UrgencyScheduler)
    assert config.scheduler_config.scheduler_cls == "vllm.somewhere.OtherScheduler"
    config.scheduler_config.scheduler_cls = None
    arguments.take_place(config, UrgencyScheduler)
    assert config.scheduler_config.scheduler_cls is UrgencyScheduler


def test_vllm_chooses_classes_only_by_what_is_looked_at() -> None:
    """Fails when vLLM has a new reason for a scheduler class of its own: look at it then."""
    import vllm

    home = Path(vllm.__file__).parent
    found = {
        path.relative_to(home).as_posix()
        for part in ("config", "platforms", "engine", "v1/engine", "model_executor/models")
        for path in (home / part).rglob("*.py")
        if "scheduler_config.scheduler_cls = " in path.read_text()
    }
    assert found <= {"config/vllm.py"}
    for line in (text := (home / "config/vllm.py").read_text().splitlines()):
        if "self.scheduler_config.scheduler_cls = " in line:
            before = text[text.index(line) - 12 : text.index(line)]
            assert any("self.diffusion_config is not None" in one for one in before)
    assert compat.Scheduler is Scheduler
