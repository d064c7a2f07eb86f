"""What to do when not everything can be on time: demote, bound, expire, share.

Least slack first is the best order while all deadlines can be met and the worst once they cannot:
workflows that are late already come first and make the next ones late. So (``protect``):

- **Hopeless**: a call whose workflow is less likely to be on time than its work is worth,

      now > D - f * (T + R)

  with T and R the q quantiles of the call and of the path after it, on the engine that is best at
  its present pace, and f ``hopeless_pace``. Little work is worth doing for a small chance: q is in
  proportion to the likely work left, ``hopeless_quantile`` where that is as much as new workflows
  usually have. It is never more, so that a long workflow is given up only if it will more likely
  be late than not. The whole workflow is demoted, siblings too.
- **Entry**: a new workflow is refused (or, without ``reject_at_entry``, demoted) when its likely
  time at today's pace, times a margin, exceeds its deadline. What has begun is never turned away
  for that. The margin allows for the pace getting worse until the workflow ends:

      1 + (entry_margin - 1) * fullness

  Full is an engine whose sequence slots are taken, or that has no time but for prompts. The likely
  time is the median, yet at most twice that of the shortest tenth: where sizes differ that much and
  cannot be foreseen, refusing turns away the short ones, and giving up the long ones costs less.
- Demoted calls come behind all others, least remaining work first; yet one placement in
  ``1 / background_share`` goes to the one demoted longest, so none starves. They wait for more
  than room, for in the batches they slow all others down: at most ``background_share`` of the calls
  on the engines are demoted ones, yet always one, and any number while few slots are taken.
- The queue is bounded in calls and tokens, and in time. A workflow that has begun is not refused
  while one that has not can be.

All of this raises the share of workflows on time at the cost of those that are refused or demoted:
it is off unless asked for. Compare SCORPIO (arXiv 2505.23022), and D-over for the hopeless test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.types import NO_DEADLINE, Rejection

SATURATED: Final = "rejected-saturated"
EXPIRED: Final = "rejected-ttl-expired"
NO_ENDPOINTS: Final = "rejected-no-endpoints"
_FEW: Final = 0.1  # of the sequence slots, up to which engines count as idle
USUAL_WEIGHT: Final = 0.05
"""Of the newest workflow, in the usual work of a new one."""
_WINDOW_CALLS: Final = 8
_MEAN_WEIGHT: Final = 0.05
_MAX_TENANTS: Final = 8192


def hopeless_after(deadline_s: float, likely_s: float, pace: float) -> float:
    """Return the moment after which the workflow of a call is given up.

    Args:
        deadline_s: D of its workflow; ``inf`` gives ``inf``.
        likely_s: T + R, seconds.
        pace: f, how many times that it is allowed for.
    """
    return deadline_s - pace * likely_s


def least_odds(most: float, left: float, usual: float) -> float:
    """Return the chance of being on time below which a workflow is given up.

    Args:
        most: ``hopeless_quantile``, for a workflow that has the usual work left, or more.
        left: its likely work.
        usual: that of a new workflow; 0 if unknown.
    """
    return most * min(left / usual, 1.0) if usual > 0.0 else 0.0


def demoted_may_go(share: float, demoted: int, calls: int, slots: int) -> bool:
    """Return whether one more demoted call may go to engines.

    Args:
        share: of the calls that demoted ones may be.
        demoted: demoted calls on the engines.
        calls: all calls on them.
        slots: sequences that they run at once.
    """
    return demoted < max(share * calls, 1.0) or calls < _FEW * slots


def entry_margin(most: float, fullness: float) -> float:
    """Return how many times its predicted time a new workflow needs until its deadline.

    Args:
        most: ``entry_margin``, for full engines; up to 1 it is the answer whatever they are.
        fullness: of the engines, 0 to 1.
    """
    return most if most <= 1.0 else 1.0 + (most - 1.0) * fullness


def saturated(call_id: str) -> Rejection:
    """Return the refusal of a call because the queue is full (HTTP 429)."""
    return Rejection(call_id, SATURATED, "Too many calls are waiting; try again later.", status=429)


def crowded(call_id: str) -> Rejection:
    """Return the refusal of a new workflow because too many are open (HTTP 429)."""
    text = "Too many workflows are open; try again later."
    return Rejection(call_id, SATURATED, text, status=429)


def unattainable(call_id: str) -> Rejection:
    """Return the refusal of a new workflow that would be late (HTTP 429)."""
    return Rejection(call_id, SATURATED, "The workflow cannot meet its deadline now.", status=429)


def expired(call_id: str, waited_s: float) -> Rejection:
    """Return the refusal of a call that waited too long (HTTP 504)."""
    text = f"No engine had room for this call within {waited_s:.0f} seconds."
    return Rejection(call_id, EXPIRED, text, status=504)


def no_endpoints(call_id: str) -> Rejection:
    """Return the refusal of a call that no engine can take (HTTP 503)."""
    return Rejection(call_id, NO_ENDPOINTS, "No engine can take this call now.")


def over_bounds(options: DispatchOptions, calls: int, tokens: int) -> bool:
    """Return whether a queue of ``calls`` calls with ``tokens`` tokens is longer than allowed."""
    too_many = 0 < options.max_held_calls < calls
    return too_many or 0 < options.max_held_tokens < tokens


class FairShares:
    """Tokens served per tenant over its weight, for a bounded correction of the order by due time.

    A tenant is *ahead* when it got more than the window (tokens per unit of weight) beyond the
    least served tenant that waits. Within the window order stays by due time. A tenant that was
    away starts level with the least served, so that absence earns no credit.

    What happens to a tenant that is ahead:

    * ``strict`` (a window was chosen): its calls come behind those of all others.
    * otherwise: a call of another tenant that is *endangered* goes before them; while nobody is,
      order stays by due time. Half of its time, and twice its own length, before it is due::

          endangered from  due - max((due - since) / 2, 2 T)

      So tenants that fill the engines with calls due at once, true or not, make the calls of
      others wait, and not late; and a tenant that needs the engines at once loses nothing to one
      that can wait.

    Tokens are those expected, and when a call has ended those it took.

    Cost: O(1) for a call served, O(tenants that wait) for an order. Starves nothing: tenants that
    wait are served in turn, at the latest when each is a window behind.

    Args:
        window_tokens: more than 0; ``None`` for that of ``_WINDOW_CALLS`` average calls.
        weights: by tenant; 1 for others.
    """

    def __init__(self, window_tokens: float | None, weights: Mapping[str, float]) -> None:
        self.strict = window_tokens is not None
        self._window = window_tokens or 0.0
        self._weights = weights
        self._served: dict[str, float] = {}
        self._most = 0.0
        self._mean_tokens = 0.0

    def waits(self, tenant: str, waiting: Iterable[str]) -> None:
        """Note that ``tenant`` begins to wait beside the ``waiting`` ones."""
        served = [self._served.get(other, 0.0) for other in waiting]
        floor = min(served) if served else self._most
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor - self._window)

    def served(self, tenant: str, tokens: int) -> None:
        """Note that a call of ``tenant`` was placed."""
        if not self.strict:
            mean = self._mean_tokens or float(tokens)
            self._mean_tokens = mean + _MEAN_WEIGHT * (tokens - mean)
            self._window = _WINDOW_CALLS * self._mean_tokens
        self.settled(tenant, tokens)
        if len(self._served) > _MAX_TENANTS:
            most = sorted(self._served.items(), key=lambda item: (-item[1], item[0]))
            self._served = dict(most[: _MAX_TENANTS // 2])

    def settled(self, tenant: str, tokens: int) -> None:
        """Note that a call of ``tenant`` took ``tokens`` more than were counted, or less."""
        weight = self._weights.get(tenant, 1.0)
        total = self._served.get(tenant, 0.0) + tokens / weight
        self._served[tenant] = total
        self._most = max(self._most, total)

    def ahead(self, waiting: Iterable[str]) -> frozenset[str]:
        """Return those of the ``waiting`` tenants that are ahead."""
        served = {tenant: self._served.get(tenant, 0.0) for tenant in waiting}
        limit = min(served.values(), default=0.0) + self._window
        return frozenset(tenant for tenant, tokens in served.items() if tokens > limit)

    def forget(self, known: Iterable[str]) -> None:
        """Drop all tenants but the ``known`` ones; bounds memory."""
        self._served = {t: self._served[t] for t in known if t in self._served}


def endangered_from(due_s: float, since_s: float, own_s: float) -> float:
    """Return the moment from which a call goes before those of tenants that are ahead.

    Args:
        due_s: when it must end; ``inf`` gives ``inf``.
        since_s: when it began to wait.
        own_s: T, its own likely seconds.
    """
    if due_s == NO_DEADLINE:
        return due_s
    return due_s - max((due_s - since_s) / 2, 2.0 * own_s)


def fair_shares(options: DispatchOptions) -> FairShares | None:
    """Return what keeps tenants to their shares, ``None`` where that is switched off."""
    window = options.fair_window_tokens
    if not window:
        return None
    return FairShares(None if window < 0 else window, options.tenant_weights)
