"""What all request handlers share, made once per router."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import BadRequest, Refused
from hexgen_vllm.router.calls.intake import Intake
from hexgen_vllm.router.calls.keep_alive import KeepAlives
from hexgen_vllm.router.calls.prompt import TokenRatios
from hexgen_vllm.router.calls.retry import RetryPolicy
from hexgen_vllm.router.calls.stored import Stored
from hexgen_vllm.router.engines.attempt import Guard
from hexgen_vllm.router.engines.discovery.discovery import Discovery
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.engines.health import Stalls, Watchers
from hexgen_vllm.router.engines.kv_events import KvEvents
from hexgen_vllm.router.errors import Outcome, refused
from hexgen_vllm.router.http.client import Pool
from hexgen_vllm.router.http.messages import LateBody
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.metrics import Metrics
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.router.observe.tracing import Tracing
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.replicas import Replicas
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.tuning import Tuning


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
        tracing: begins traces of calls; ``None`` where there are none.
        kv_events: correct what is believed of engines' prefix caches.
        pool: connections to engines for what is no call.
        tuning: tunes placement on recent traffic; ``None`` when it is off.
        replicas: what tells other routers, and hears of them; ``None`` when there are none.
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
    tracing: Tracing | None
    kv_events: KvEvents
    pool: Pool
    tuning: Tuning | None = None
    replicas: Replicas | None = None
    draining: bool = False

    @property
    def ready(self) -> bool:
        """Whether a call that comes now would be served."""
        return not self.draining and any(engine.answers for engine in self.fleet.ready())

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
        self.kv_events.tick()

    def check_open(self) -> None:
        """Check that new calls are taken.

        Raises:
            Refused: the router is shutting down or full.
        """
        if self.draining:
            raise shutting_down()
        most = self.options.max_concurrent_requests
        if 0 < most < self.ledger.open:
            raise refused(Outcome.SATURATED)

    def check_model(self, model: str) -> None:
        """Check that some engine, up or not, serves ``model``.

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
