"""Deadlines for ``vllm.LLM`` and ``AsyncLLM``: what a request says rides in its sampling params."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

from hexgen_vllm import wire
from hexgen_vllm.client.scope import checked, checked_deadline_s

ParamsT = TypeVar("ParamsT")


def with_deadline(
    params: ParamsT,
    deadline_s: float | None = None,
    *,
    workflow_id: str | None = None,
    workflow_type: str | None = None,
    stage: str | None = None,
    stages_left: int | None = None,
    expected_output_tokens: int | None = None,
    final: bool | None = None,
) -> ParamsT:
    """Return a copy of ``params`` that tells our scheduler what it needs to know.

    Args:
        params: ``vllm.SamplingParams``, or anything with a dict or ``None`` in ``extra_args``.
        deadline_s: seconds left for the whole workflow from when the engine gets the request.
        workflow_id: workflow that the request belongs to; alone it is its own.
        workflow_type: name under which the shape of such workflows is learned.
        stage: name of the stage.
        stages_left: how many stages follow, if known.
        expected_output_tokens: how long the answer will be, if known.
        final: whether nothing follows this request.

    Raises:
        ConfigError: a value is not legal; names the field.
    """
    left_ms = None if deadline_s is None else 1000.0 * checked_deadline_s(deadline_s)
    meta = checked(
        wire.CallMeta(
            workflow_id=workflow_id,
            workflow_type=workflow_type,
            workflow_deadline_ms=left_ms,
            stage=stage,
            stages_left=stages_left,
            expected_output_tokens=expected_output_tokens,
            workflow_final=final,
        )
    )
    copied = cast("Any", copy.copy(params))
    copied.extra_args = {**(copied.extra_args or {}), **wire.to_xargs(meta)}
    return cast("ParamsT", copied)
