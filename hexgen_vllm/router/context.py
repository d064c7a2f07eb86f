"""What all request handlers share, made once per router."""

from __future__ import annotations

import random
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from hexgen_vllm.clock import Clock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import BadRequest, Refused
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.router.answers import Outcome, refused
from hexgen_vllm.router.attempt import Guard
from hexgen_vllm.router.discovery.discovery import Discovery
from hexgen_vllm.router.discovery.metrics import DiscoveryMetrics
from hexgen_vllm.router.fleet import Fleet
from hexgen_vllm.router.http_body import LateBody
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.intake import Intake
from hexgen_vllm.router.keep_alive import KeepAlives
from hexgen_vllm.router.ledger import Ledger
from hexgen_vllm.router.metrics import Metrics
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.probe import Probe
from hexgen_vllm.router.prompt import TokenRatios
from hexgen_vllm.router.recorder import Recorder
from hexgen_vllm.router.retry import RetryPolicy
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.stalls import Stalls
from hexgen_vllm.router.stored import Stored
from hexgen_vllm.router.tracing import Tracing, open_tracing
from hexgen_vllm.router.tuning import Tuning
from hexgen_vllm.router.watchers import Watchers
from hexgen_vllm.tune.recent import Ring


@dataclass(slots=True)
class Context:
    """The parts of one router.

    Attributes:
        options: as given.
        clock: its time.
        epoch_s: when it was made; priorities for stock engines count from here.
        ledger: book of calls.
        service: drives the coordinator.
        guard: ends tries that hang.
        stalls: notices engines that do nothing.
        fleet: the engines.
        watchers: keep the fleet's picture true.
        discovery: finds engines, where options say so.
        ratios: prompt length estimates.
        intake: reads requests.
        retries: bounds retries.
        stored: which engine has which stored response.
        keep_alives: sends comments to clients that wait for streams.
        metrics: histograms and exposition.
        tracing: begins traces of calls.
        session: connections to engines.
        tuning: tunes placement on recent traffic; ``None`` when it is off.
        draining: whether new calls are refused because the router is shutting down.
    """

    options: RouterOptions
    clock: Clock
    epoch_s: float
    ledger: Ledger
    service: Service
    guard: Guard
    stalls: Stalls
    fleet: Fleet
    watchers: Watchers
    discovery: Discovery
    ratios: TokenRatios
    intake: Intake
    retries: RetryPolicy
    stored: Stored
    keep_alives: KeepAlives
    metrics: Metrics
    tracing: Tracing
    session: aiohttp.ClientSession
    tuning: Tuning | None = None
    draining: bool = False

    @property
    def ready(self) -> bool:
        """Whether a call that comes now would be served."""
        return not self.draining and bool(self.fleet.ready())

    def suspect(self, engine: str) -> None:
        """Have an engine's health checked now."""
        self.watchers.suspect(engine)

    def tick(self) -> None:
        """Do what time alone causes; call it about twice a second."""
        now = self.clock.now()
        self.service.tick()
        self.guard.tick(now)
        self.stalls.tick(now)
        self.fleet.tick(now)
        self.watchers.sweep()
        self.keep_alives.tick(now)

    def check_open(self) -> None:
        """Return if new calls are taken.

        Raises:
            Refused: the router is shutting down or full.
        """
        if self.draining:
            raise shutting_down()
        most = self.options.max_concurrent_requests
        if 0 < most < self.ledger.open:
            raise refused(Outcome.SATURATED)

    def check_model(self, model: str) -> None:
        """Return if some engine serves ``model``, up or not.

        Raises:
            BadRequest: none does.
            Refused: no engine has been up yet, so that nobody knows.
        """
        if self.fleet.knows(model):
            return
        self._check_known()
        shown = model if len(model) <= 100 else f"{model[:100]}..."
        raise BadRequest(
            f"The model {shown!r} does not exist.",
            param="model",
            status=404,
            code="model_not_found",
        )

    def default_model(self) -> str | None:
        """Return the model that a call without one means, ``None`` when there are several.

        Raises:
            Refused: no engine has been up yet, so that nobody knows.
        """
        self._check_known()
        return self.fleet.default_model()

    def any_model(self) -> str:
        """Return the model of an engine that gets calls, for what needs no particular one.

        Raises:
            Refused: no engine has been up yet.
        """
        model = self.default_model()
        if model is None:
            models = [str(e.cards[0]["id"]) for e in self.fleet.ready() if e.cards]
            model = models[0] if models else ""
        return model

    def _check_known(self) -> None:
        if all(engine.spec is None for engine in self.fleet.engines.values()):
            raise refused(Outcome.NO_ENDPOINTS, "No engine is ready yet.")


def shutting_down() -> Refused:
    """Return the refusal of calls that come or wait while the router stops."""
    return refused(Outcome.SHUTTING_DOWN, retry_after_s=5.0)


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        BadRequest: it is too long, too late, or broken.
        Refused: the router holds too much already.
    """
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BadRequest("The body is too large.", status=413, code="body_too_large") from None
    except LateBody:
        raise BadRequest("The body came too slowly.", status=408, code="body_timeout") from None
    except web.RequestPayloadError:
        raise BadRequest("The body could not be read.", code="bad_body") from None


def new_context(
    options: RouterOptions,
    dispatch: DispatchOptions,
    clock: Clock,
    session: aiohttp.ClientSession,
) -> Context:
    """Make the parts of a router; nothing runs yet."""
    ledger, ratios = Ledger(), TokenRatios()
    ring = Ring(options.tune_ring)
    recorder = None if options.tune == "off" else Recorder(ring)
    service = Service(Coordinator(options.bounded(dispatch)), clock, ledger, recorder)
    tuning = None
    if recorder is not None:
        tuning = Tuning(options, service.coordinator, clock, ring, service.retune)
    guard = Guard(options.request_timeout_secs, options.stream_stall_timeout_secs)
    fleet = Fleet(options, service, guard)
    watchers = Watchers(fleet, service, Probe(session, options), options, clock)
    discovery = Discovery(options, fleet, watchers, clock)
    metrics = Metrics(ledger, service, fleet, None if tuning is None else tuning.tuner)
    metrics.add(DiscoveryMetrics(discovery))
    return Context(
        options=options,
        clock=clock,
        epoch_s=clock.now(),
        ledger=ledger,
        service=service,
        guard=guard,
        stalls=Stalls(options, fleet, guard, service.coordinator),
        fleet=fleet,
        watchers=watchers,
        discovery=discovery,
        ratios=ratios,
        intake=Intake(ratios, dispatch.default_deadline_s, options.request_id_headers),
        retries=RetryPolicy(options, random.Random()),
        stored=Stored(),
        keep_alives=KeepAlives(options.sse_keep_alive_interval),
        metrics=metrics,
        tracing=open_tracing(options.otlp_traces_endpoint, dispatch.policy),
        session=session,
        tuning=tuning,
    )
