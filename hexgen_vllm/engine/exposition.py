"""An engine's snapshots in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Final

PREFIX: Final = "hexgen_vllm_"

# Snapshot field -> metric name, kind, help.
_SINGLE: Final = {
    "running": ("running", "gauge", "Calls in the batch."),
    "waiting": ("waiting", "gauge", "Calls queued in the engine."),
    "kv_usage": ("kv_usage_ratio", "gauge", "Share of KV blocks in use, 0 to 1."),
    "kv_tokens": ("kv_tokens", "gauge", "Tokens that the KV cache holds."),
    "max_num_seqs": ("max_num_seqs", "gauge", "Calls that the batch can hold."),
    "prefill_share": ("prefill_time_ratio", "gauge", "Share of recent busy time on prefill."),
    "fit_error": ("step_cost_error_ratio", "gauge", "Median relative error of the step-cost fit."),
    "steps": ("steps_total", "counter", "Steps that computed something."),
    "recomputed_tokens": (
        "recomputed_tokens_total",
        "counter",
        "Tokens computed again after a preemption.",
    ),
    "batch_tokens_given_up": (
        "batch_tokens_given_up_total",
        "counter",
        "Tokens that calls without deadline did not write because others could not bear it.",
    ),
    "length_error": (
        "length_error_ratio",
        "gauge",
        "Mean relative error of the output lengths expected lately.",
    ),
    "bad_metadata": ("bad_metadata_total", "counter", "Metadata values that could not be read."),
}

# The same for the fields of the snapshot's ``host_kv``.
_HOST_KV: Final = {
    "capacity_bytes": ("host_kv_capacity_bytes", "gauge", "Host memory for preempted calls' KV."),
    "used_bytes": ("host_kv_used_bytes", "gauge", "Host memory that holds preempted calls' KV."),
    "copies": ("host_kv_copies", "gauge", "Preempted calls whose KV is in host memory."),
    "saved_tokens": ("host_kv_saved_tokens_total", "counter", "Tokens whose KV was saved."),
    "saved_bytes": ("host_kv_saved_bytes_total", "counter", "Bytes of KV that were saved."),
    "restored_tokens": ("host_kv_restored_tokens_total", "counter", "Tokens whose KV was loaded."),
    "restored_bytes": ("host_kv_restored_bytes_total", "counter", "Bytes of KV that were loaded."),
    "cached_tokens": (
        "host_kv_cached_tokens_total",
        "counter",
        "Saved tokens that the prefix cache still held when they were wanted.",
    ),
    "save_bytes_per_s": ("host_kv_save_bytes_per_second", "gauge", "Bandwidth of saves."),
    "restore_bytes_per_s": ("host_kv_restore_bytes_per_second", "gauge", "Bandwidth of loads."),
}
_HOST_KV_BY_REASON: Final = {
    "dropped_tokens": ("host_kv_dropped_tokens_total", "Saved tokens never loaded, by reason."),
    "refused_tokens": ("host_kv_refused_tokens_total", "Tokens not saved, by reason."),
}


def _escaped(value: object) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _labelled(labels: Mapping[str, object]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


class _Page:
    """Metrics in order, each with the samples of all ranks together."""

    def __init__(self) -> None:
        self.labels: Mapping[str, object] = {}  # that every sample gets
        self._families: dict[str, list[str]] = {}

    def metric(
        self, name: str, kind: str, text: str, samples: Mapping[tuple[str, str] | None, Any]
    ) -> None:
        """Add samples, keyed by their own label; ``None`` values are left out."""
        known = {label: value for label, value in samples.items() if value is not None}
        if not known:
            return
        head = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
        lines = self._families.setdefault(name, head)
        for label, value in known.items():
            own = {label[0]: label[1]} if label is not None else {}
            lines.append(f"{PREFIX}{name}{_labelled({**self.labels, **own})} {value}")

    def text(self) -> str:
        """Return the page."""
        return "\n".join(line for lines in self._families.values() for line in lines) + "\n"


def exposition(*snapshots: Mapping[str, Any]) -> str:
    """Return the metrics of an engine; what it does not know is left out.

    Args:
        snapshots: as :func:`hexgen_vllm.engine.telemetry.snapshot` returns them, one for each
            data-parallel rank. With several, samples say whose they are as vLLM's own do, by
            ``engine``.
    """
    page = _Page()
    for rank, snapshot in enumerate(snapshots):
        if len(snapshots) > 1:
            page.labels = {"engine": snapshot.get("engine", rank)}
        _add(page, snapshot)
    return page.text()


def _add(page: _Page, snapshot: Mapping[str, Any]) -> None:
    page.metric("info", "gauge", "Always 1; the order in force.", {("order", snapshot["order"]): 1})
    for field, (name, kind, text) in _SINGLE.items():
        page.metric(name, kind, text, {None: snapshot.get(field)})
    page.metric(
        "preemptions_total",
        "counter",
        "Preemptions by cause.",
        {("cause", cause): n for cause, n in snapshot["preemptions"].items()},
    )
    page.metric(
        "step_cost",
        "gauge",
        "Coefficients of the fitted step cost, in seconds.",
        {("coefficient", name): v for name, v in (snapshot["cost"] or {}).items()},
    )
    bounds = [*map(str, snapshot["slack_bounds_s"]), "+Inf"]
    page.metric(
        "slack_calls",
        "gauge",
        "Running and waiting calls whose slack is at most le seconds.",
        {("le", b): n for b, n in zip(bounds, accumulate(snapshot["slack_counts"]), strict=True)},
    )
    if snapshot.get("host_kv"):
        _add_host_kv(page, snapshot["host_kv"])


def _add_host_kv(page: _Page, host_kv: Mapping[str, Any]) -> None:
    for field, (name, kind, text) in _HOST_KV.items():
        page.metric(name, kind, text, {None: host_kv.get(field)})
    for field, (name, text) in _HOST_KV_BY_REASON.items():
        by_reason = host_kv.get(field, {}).items()
        page.metric(name, "counter", text, {("reason", reason): n for reason, n in by_reason})
