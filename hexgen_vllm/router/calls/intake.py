"""A request becomes a :class:`~hexgen_vllm.types.Call`: parsed once, its bytes kept."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import msgspec

from hexgen_vllm import wire
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.policy.claims import MAX_PRIORITY
from hexgen_vllm.router import foreign as others
from hexgen_vllm.router.calls.prefill import can_part
from hexgen_vllm.router.calls.prompt import (
    Prompt,
    TokenRatios,
    chain,
    read_prompt,
)
from hexgen_vllm.router.calls.transcript import Terms, terms_of
from hexgen_vllm.router.endpoints import Endpoint
from hexgen_vllm.router.foreign import Foreign
from hexgen_vllm.router.http.messages import LARGE_BYTES, HeaderMap, Pairs, aside
from hexgen_vllm.router.tenants import ANYBODY, Client
from hexgen_vllm.types import LONE, NO_DEADLINE, Call

MAX_REQUEST_ID_CHARS: Final = 256
SESSION_TYPE: Final = "session"
CHILD_STAGE: Final = "subagent"
"""Stage of the calls of a child session that name none."""
MAX_VALUES: Final = 2**20
"""Commas and brackets in a body: a prompt of as many token ids is longer than any model takes."""

MAX_CONTAINERS: Final = 2**17
"""Lists and objects in a body. To make one takes ten times as long as a number, and the event loop
waits meanwhile, whichever thread does it."""

_MAX_NAMES: Final = 1024  # in an object at the top of a large body
_MAX_STORED_ID: Final = 256
_MAX_DEPTH: Final = 3  # of what is read of a body besides the prompt
SESSION_HEADER: Final = "x-session-id"
PRIORITY_HEADER: Final = "x-vllm-priority"
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_NONE: Final[tuple[str, ...]] = ()
_DECODER: Final = msgspec.json.Decoder()
_MAX_FORM_BYTES: Final = 2**16  # of a URL-encoded form or a part, where the model is looked for
_MAX_PARTS: Final = 1000  # of a form
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.I)
_FIELD_NAME: Final = re.compile(rb'\bname=(?:"([^"]*)"|([^\s;"]+))', re.I)
_NOT_IN_REQUEST_ID: Final = re.compile(r"[^\x21-\x7e]+")


@dataclass(init=False, slots=True)
class Accepted:
    """A request that can be served.

    Attributes:
        call: what policies see.
        pairs: the client's headers, names and values as they came.
        body: bytes for the engine; the client's own unless something had to be taken out.
        prompt: what the length estimate stands on.
        session_id: workflow or session the client named, ``None`` when it named none.
        service_class: ``batch`` for a call that nobody waits for, ``None`` where nothing is said.
        said: headers that replace the client's, by lower-case name.
        clamped: what the client claimed beyond its ceiling.
        follows: the stored response that it goes on from, ``None`` if none.
        conversation: the stored conversation that it is part of, ``None`` if none.
        agent: the agent that makes it, ``None`` where nothing is said.
        keep_s: seconds for which its KV should stay, ``None`` where nothing is said.
        last: nothing follows in the workflow or session that the client named.
        terms: on which another engine can go on with the answer, ``None`` if none can.
    """

    call: Call
    pairs: Pairs
    body: bytes
    prompt: Prompt
    session_id: str | None
    service_class: str | None
    said: Mapping[str, str]
    clamped: tuple[str, ...]
    follows: str | None
    conversation: str | None
    agent: str | None
    keep_s: float | None
    last: bool
    terms: Terms | None

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        call: Call,
        pairs: Pairs,
        body: bytes,
        prompt: Prompt,
        session_id: str | None,
        service_class: str | None = None,
        *,
        said: Mapping[str, str] = _NOTHING,
        clamped: tuple[str, ...] = (),
        follows: str | None = None,
        conversation: str | None = None,
        agent: str | None = None,
        keep_s: float | None = None,
        last: bool | None = None,
        terms: Terms | None = None,
    ) -> None:
        self.call, self.pairs = call, pairs
        self.body, self.prompt, self.session_id = body, prompt, session_id
        self.service_class = service_class
        self.said, self.clamped, self.follows = said, clamped, follows
        self.conversation, self.agent, self.keep_s = conversation, agent, keep_s
        self.last = call.final if last is None else last
        self.terms = terms

    def with_body(self, body: bytes) -> Accepted:
        """Return it with another body for the engine."""
        return replace(self, body=body)


class Parsed(NamedTuple):
    """A body that was read beside the event loop.

    Attributes:
        body: what is there besides the prompt; long or deep values are empty lists.
        prompt: what its fields hold.
        kept: bytes for the engine.
        terms: on which another engine can go on with the answer.
    """

    body: Mapping[str, Any]
    prompt: Prompt
    kept: bytes
    terms: Terms | None


class Top(NamedTuple):
    """Where a child session belongs.

    Attributes:
        root: the session at the top of its tree.
        detached: nobody there waits for it.
    """

    root: str
    detached: bool


class Trees:
    """Which sessions were begun by which: agents that have other agents work for them.

    Args:
        most: child sessions remembered; the one longest unheard of is forgotten.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._tops: OrderedDict[tuple[str, str], Top] = OrderedDict()
        self._most = most

    def top(self, whose: str, session: str, said: Foreign) -> Top | None:
        """Return where a session belongs, ``None`` if it is no child.

        Args:
            whose: the tenant, where sessions belong to tenants.
            session: the session of a call.
            said: what the call says. Once is enough, and of a parent that is a child itself, too.
        """
        key = (whose, session)
        known = self._tops.get(key)
        above = said.root_id or said.parent_id
        if above is None:
            if known is not None:
                self._tops.move_to_end(key)
            return known
        further = self._tops.get((whose, above))
        root = above if further is None else further.root
        if root == session:  # it would be above itself
            return None
        top = Top(root, said.detached or (further is not None and further.detached))
        self._tops[key] = top
        self._tops.move_to_end(key)
        if len(self._tops) > self._most:
            self._tops.popitem(last=False)
        return top


class Intake:
    """Reads requests.

    Args:
        ratios: prompt length estimates.
        default_deadline_s: deadline of calls of a session, which have no workflow deadline.
        request_id_headers: headers that may bring a request id.
    """

    def __init__(
        self, ratios: TokenRatios, default_deadline_s: float, request_id_headers: tuple[str, ...]
    ) -> None:
        self._ratios = ratios
        self._default_deadline_s = default_deadline_s
        self._request_id_headers = request_id_headers
        self._trees = Trees()
        self._numbers = itertools.count()
        self._made_up = f"hexgen-{secrets.token_hex(12)}"

    def request_id(self, headers: Mapping[str, str]) -> str:
        """Return the client's request id, or a new one if nothing of it can stay.

        Answers and logs repeat it: only printable ASCII stays, the first
        :data:`MAX_REQUEST_ID_CHARS` of it.
        """
        for name in self._request_id_headers:
            value = headers.get(name)
            if value and (kept := _NOT_IN_REQUEST_ID.sub("", value)[:MAX_REQUEST_ID_CHARS]):
                return kept
        return f"{self._made_up}-{next(self._numbers)}"

    async def session(self, endpoint: Endpoint, names: HeaderMap, raw: bytes) -> str | None:
        """Return the workflow or session that a request names, as :meth:`read` does.

        Raises:
            BadRequest: as :meth:`read`.
        """
        parsed = await parsed_aside(endpoint, names, raw)
        body = _read_body(endpoint, names, raw) if parsed is None else parsed.body
        own, foreign = _said(names, body).workflow_id, others.read(names, body)
        # All of a tree belong to one process.
        return foreign.root_id or foreign.parent_id or own or foreign.session_id

    def read(
        self,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        raw: bytes,
        now: float,
        default_model: Callable[[], str | None],
        pairs: Pairs | None = None,
        parsed: Parsed | None = None,
        client: Client = ANYBODY,
    ) -> Accepted:
        """Read a request.

        Args:
            endpoint: where it came in.
            headers: case-insensitive.
            raw: its body.
            now: time of receipt.
            default_model: returns the model meant by a body that names none, ``None`` when there
                are several.
            pairs: the headers as they came, for the engine.
            parsed: what :func:`parsed_aside` made of ``raw``, which need not be decoded then.
            client: who asks.

        Raises:
            BadRequest: the body is no JSON object, or one of our fields has a bad value.
        """
        names = headers if isinstance(headers, HeaderMap) else HeaderMap.of(headers)
        body = _read_body(endpoint, names, raw) if parsed is None else parsed.body
        model = _model(body, default_model)
        said = _said(names, body)
        foreign = others.read(names, body, raw if endpoint.generates else b"")
        if parsed is None:
            prompt, kept, terms = _made_of(endpoint, body, raw)
        else:
            prompt, kept, terms = parsed.prompt, parsed.kept, parsed.terms
        service_class = _service_class(said, foreign)
        session_id = said.workflow_id or foreign.session_id
        tenant = said.tenant or foreign.tenant
        whose = client.acts_for(tenant) if client.scoped else ""
        top = None if session_id is None else self._trees.top(whose, session_id, foreign)
        call = self._call(endpoint, model, said, foreign, prompt, body, now, top)
        clamped, headers_said = _NONE, _NOTHING
        if client is not ANYBODY:
            call, clamped = _held_to(client, call, session_id, tenant, now)
            if service_class == wire.INTERACTIVE and client.ceiling.max_priority < 0:
                service_class, clamped = None, (*clamped, "class")
            headers_said = _said_for(client, call, session_id, names, body)
            if session_id is not None:
                session_id = client.engine_id(call.tenant, session_id)
            if client.scoped:
                _check_response_id(body)
        return Accepted(
            call=call,
            pairs=pairs or [],
            body=kept,
            prompt=prompt,
            session_id=session_id,
            service_class=service_class,
            said=headers_said,
            clamped=clamped,
            follows=_follows(endpoint, body),
            conversation=_conversation(endpoint, body),
            agent=foreign.agent,
            keep_s=foreign.keep_s if said.keep_ms is None else said.keep_ms / 1000.0,
            last=call.final or bool(said.workflow_final or foreign.final),
            terms=terms,
        )

    def tenant(self, names: HeaderMap) -> str | None:
        """Return the tenant that the headers of a request name.

        Raises:
            BadRequest: one of our headers has a bad value.
        """
        return wire.from_headers(names).tenant or others.read(names, {}).tenant

    def _call(
        self,
        endpoint: Endpoint,
        model: str,
        said: wire.CallMeta,
        foreign: Foreign,
        prompt: Prompt,
        body: Mapping[str, Any],
        now: float,
        top: Top | None,
    ) -> Call:
        call_id = f"call-{next(self._numbers)}"
        in_workflow = said.workflow_id is not None
        in_session = not in_workflow and foreign.session_id is not None
        expected = said.expected_output_tokens or foreign.expected_output_tokens
        default_type = SESSION_TYPE if in_session else "default"
        usual_stage = "default" if endpoint.generates else endpoint.name
        default_stage = usual_stage if top is None else CHILD_STAGE
        workflow_id = said.workflow_id or foreign.session_id or f"{LONE}{call_id}"
        waited_for = top is not None and not top.detached
        if top is not None and waited_for:
            workflow_id = top.root
        resume_s = foreign.resume_s if said.resume_ms is None else said.resume_ms / 1000.0
        return Call(
            call_id=call_id,
            # The prefix keeps a client's session from naming another client's lone call.
            workflow_id=workflow_id,
            arrived_s=now,
            prompt_tokens=self._ratios.tokens(model, prompt),
            workflow_type=said.workflow_type or default_type,
            stage=said.stage or foreign.stage or default_stage,
            tenant=said.tenant or foreign.tenant or "default",
            model=model,
            deadline_s=self._deadline_s(said, foreign, now, in_session),
            expected_output_tokens=expected if endpoint.generates else 1,
            max_output_tokens=_limit(endpoint, body),
            stages_left=0 if in_session and said.stages_left is None else said.stages_left,
            # What ends a child does not end what it is a part of.
            final=not waited_for
            and (bool(said.workflow_final or foreign.final) or not (in_workflow or in_session)),
            priority=foreign.priority,
            streamed=body.get("stream") is True,
            prefix=chain(prompt, model),
            prefix_chunk_tokens=self._ratios.chunk_tokens(model, prompt),
            deadline_asked=self._asks(said, foreign),
            root=None if top is None else top.root,
            resume_s=resume_s,
            whole=not can_part(endpoint, body),
        )

    def _asks(self, said: wire.CallMeta, foreign: Foreign) -> bool:
        timeout_s = foreign.timeout_s
        if _service_class(said, foreign) == wire.BATCH:
            return False
        sooner = timeout_s is not None and timeout_s <= self._default_deadline_s
        return sooner or said.workflow_deadline_ms is not None

    def _deadline_s(
        self, said: wire.CallMeta, foreign: Foreign, now: float, in_session: bool
    ) -> float:
        if _service_class(said, foreign) == wire.BATCH:
            return NO_DEADLINE  # nobody waits, whatever else is said
        if said.workflow_deadline_ms is not None:
            return now + said.workflow_deadline_ms / 1000.0
        if said.workflow_id is not None:
            return NO_DEADLINE  # a later call of a workflow does not move its deadline
        usual = self._default_deadline_s
        if foreign.timeout_s is not None:
            return now + min(foreign.timeout_s, usual)
        return now + usual if in_session else NO_DEADLINE


def _service_class(said: wire.CallMeta, foreign: Foreign) -> str | None:
    return said.service_class or (wire.BATCH if foreign.batch else None)


def _held_to(
    client: Client, call: Call, session_id: str | None, tenant: str | None, now: float
) -> tuple[Call, tuple[str, ...]]:
    """Return what is left of a call when its client's ceiling holds, and what was too much.

    Args:
        client: who asks.
        call: as claimed.
        session_id: the workflow or session that it names.
        tenant: that it names.
        now: time of receipt.
    """
    ceiling, owner = client.ceiling, client.acts_for(tenant)
    if client.scoped:
        call.taught_by = owner
    priority = ceiling.priority(call.priority)
    deadline_s = ceiling.deadline_s(call.deadline_s, now)
    claims = (
        ("priority", priority != call.priority),
        ("deadline", deadline_s != call.deadline_s),
        ("tenant", tenant is not None and owner != tenant),
    )
    clamped = tuple(name for name, too_much in claims if too_much)
    owned = session_id is not None and client.scoped
    if not clamped and not owned and owner == call.tenant:
        return call, clamped
    own_id = call.workflow_id if session_id is None else client.own_id(owner, call.workflow_id)
    root = None if call.root is None else client.own_id(owner, call.root)
    held = replace(
        call, tenant=owner, priority=priority, deadline_s=deadline_s, workflow_id=own_id, root=root
    )
    return held, clamped


def _said_for(
    client: Client, call: Call, session_id: str | None, names: HeaderMap, body: Mapping[str, Any]
) -> Mapping[str, str]:
    """Return the headers that engines get in place of the client's own."""
    said: dict[str, str] = {}
    if client.scoped and session_id is not None:
        said[SESSION_HEADER] = client.engine_id(call.tenant, session_id)
    limited = client.ceiling.max_priority < MAX_PRIORITY
    if limited and (PRIORITY_HEADER in names or "priority" in body):
        said[PRIORITY_HEADER] = str(-call.priority)  # vLLM takes the header before the body
    return said


def _follows(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    """Return the stored response that a body goes on from, ``None`` if none."""
    follows = body.get("previous_response_id")
    reads = endpoint.name == "responses" or not endpoint.known
    return follows if reads and isinstance(follows, str) and follows else None


def _conversation(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    """Return the conversation that a response is to be part of: its id, or an object with it."""
    said = body.get("conversation") if endpoint.name == "responses" else None
    found = said.get("id") if isinstance(said, dict) else said
    return found[:_MAX_STORED_ID] if isinstance(found, str) and found else None


def _check_response_id(body: Mapping[str, Any]) -> None:
    """Let nobody choose the id of a response: it could be that of another tenant's.

    Raises:
        BadRequest: the body asks for such an id.
    """
    asked = body.get("request_id")
    if isinstance(asked, str) and asked.startswith("resp"):
        text = "request_id must not begin with 'resp': the ids of responses are made by engines."
        raise BadRequest(text, param="request_id")


def _may_refuse(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Whether an engine may refuse a body for what it says in other projects' words."""
    said = "vllm_xargs" in body or "service_tier" in body
    return said and endpoint.placed and endpoint.known


def _read_body(endpoint: Endpoint, names: HeaderMap, raw: bytes) -> dict[str, Any]:
    """Return what is known of a body; of one that need not be JSON, the model it names.

    Raises:
        BadRequest: it is no JSON object where it must be one.
    """
    if endpoint.known:
        return decoded(raw)
    kind = names.get("content-type", "")
    if "form" in kind.lower():
        model = form_field(kind, raw, "model")
        return {} if model is None else {"model": model}
    try:
        body = decoded(raw)
    except BadRequest:
        return {}
    if not isinstance(body.get("model"), str):
        body.pop("model", None)
    return body


def form_field(kind: str, raw: bytes, name: str) -> str | None:
    """Return a field of a form, ``None`` if it has none of this name.

    Args:
        kind: content type of the form, multipart or URL-encoded.
        raw: the form.
        name: of the field.
    """
    boundary = _BOUNDARY.search(kind)
    if boundary is None:
        found = parse_qs(raw[:_MAX_FORM_BYTES].decode("utf-8", "replace"))
        return found.get(name, [None])[0]
    mark = b"--" + (boundary[1] or boundary[2]).encode("utf-8", "surrogateescape")
    begin = raw.find(mark)
    for _ in range(_MAX_PARTS):
        if begin < 0:
            break
        begin += len(mark)
        end = raw.find(mark, begin)
        stop = min(end if end >= 0 else len(raw), begin + _MAX_FORM_BYTES)
        head, _, value = raw[begin:stop].partition(b"\r\n\r\n")
        said = _FIELD_NAME.search(head)
        if said is not None and (said[1] or said[2]).decode("utf-8", "replace") == name:
            return value.removesuffix(b"\r\n").decode("utf-8", "replace")
        begin = end
    return None


async def parsed_aside(endpoint: Endpoint, names: HeaderMap, raw: bytes) -> Parsed | None:
    """Return what a large body holds, read beside the event loop; ``None`` for others.

    Args:
        endpoint: where it came in.
        names: headers of the request.
        raw: the body.

    Raises:
        BadRequest: it is no JSON object where it must be one, or holds too much.
    """
    return await aside(_parse, endpoint, names, raw) if len(raw) > LARGE_BYTES else None


async def fields(raw: bytes) -> Mapping[str, Any]:
    """Return the JSON object in ``raw``; of a large one, what there is besides lists.

    Raises:
        BadRequest: it is no JSON object, or holds too much.
    """
    return await aside(_fields, raw) if len(raw) > LARGE_BYTES else decoded(raw)


def _parse(endpoint: Endpoint, names: HeaderMap, raw: bytes) -> Parsed:
    body = _read_body(endpoint, names, raw)
    found = _made_of(endpoint, body, raw)
    # All else ends here: to free a million values takes as long as to make them.
    return Parsed(_shallow(body, _MAX_DEPTH), *found)


def _made_of(
    endpoint: Endpoint, body: Mapping[str, Any], raw: bytes
) -> tuple[Prompt, bytes, Terms | None]:
    """Return the prompt of a body, its bytes for an engine, and on what terms it goes on."""
    prompt = read_prompt(body, endpoint.prompt_fields)
    kept = _for_engine(body, raw) if _may_refuse(endpoint, body) else raw
    return prompt, kept, terms_of(body) if endpoint.goes_on else None


def _fields(raw: bytes) -> Mapping[str, Any]:
    return _shallow(decoded(raw), _MAX_DEPTH)


def _shallow(found: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return ``found`` with its objects as far as they are read, and no lists."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict) and depth > 1 and len(value) <= _MAX_NAMES:
            kept[name] = _shallow(value, depth - 1)
        else:
            kept[name] = [] if isinstance(value, dict | list) else value
    return kept


def _check_amount(raw: bytes) -> None:
    """Check that decoding ``raw`` does not take too long.

    Raises:
        BadRequest: it holds too many values.
    """
    if _fits(raw):
        return
    # What stands in strings does not count: they may be JSON themselves, or programs.
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 2 * MAX_VALUES or not _fits(b"".join(bare.split(b'"')[::2])):
        raise _too_many()


def _fits(text: bytes) -> bool:
    containers = text.count(b"[") + text.count(b"{")
    return containers <= MAX_CONTAINERS and containers + text.count(b",") <= MAX_VALUES


def _too_many() -> BadRequest:
    return BadRequest("The body holds too many values.", status=413, code="too_many_values")


def decoded(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in ``raw``.

    Raises:
        BadRequest: it is not JSON, or no object, or a large one that holds too much.
    """
    if len(raw) > LARGE_BYTES:
        _check_amount(raw)
    try:
        body = _DECODER.decode(raw)
    except (ValueError, RecursionError):
        body = _in_python(raw)
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    if len(raw) > LARGE_BYTES and len(body) > _MAX_NAMES:
        raise _too_many()
    return body


def _in_python(raw: bytes) -> Any:
    """Decode what Python's own reader takes beyond the standard: NaN, lone surrogates, UTF-16.

    Engines take it, too, so it is for them to refuse.

    Raises:
        BadRequest: it is not JSON.
    """
    try:
        return wire.from_json(raw)
    except ValueError:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from None


def _model(body: Mapping[str, Any], default_model: Callable[[], str | None]) -> str:
    """Return the model that a body names; missing, null and empty are one, as in vLLM."""
    model = body.get("model")
    if isinstance(model, str) and model:
        return model
    if model in (None, "") and (default := default_model()) is not None:
        return default
    raise BadRequest("model must name a model.", param="model")


def _said(names: HeaderMap, body: Mapping[str, Any]) -> wire.CallMeta:
    said = wire.from_headers(names)
    return wire.merged(said, _said_in_body(body)) if "vllm_xargs" in body else said


def _said_in_body(body: Mapping[str, Any]) -> wire.CallMeta:
    xargs = body.get("vllm_xargs")
    return wire.from_xargs(xargs) if isinstance(xargs, dict) else wire.CallMeta()


def _for_engine(body: Mapping[str, Any], raw: bytes) -> bytes:
    """Return the body's bytes without what vLLM refuses.

    That is the nested agentic context, and a service tier that OpenAI's list does not have.

    Raises:
        BadRequest: it is nested too deeply to be written again.
    """
    xargs = body.get("vllm_xargs")
    nested = isinstance(xargs, dict) and "agentic_context" in xargs
    if not nested and body.get("service_tier") != wire.BATCH:
        return raw
    kept = dict(body)
    if kept.get("service_tier") == wire.BATCH:
        kept["service_tier"] = "flex"
    if isinstance(xargs, dict) and nested:
        rest = {name: value for name, value in xargs.items() if name != "agentic_context"}
        del kept["vllm_xargs"]
        if rest:
            kept["vllm_xargs"] = rest
    try:
        return json.dumps(kept).encode()
    except RecursionError:  # nested as deeply as could just be read
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from None


def _limit(endpoint: Endpoint, body: Mapping[str, Any]) -> int | None:
    if not endpoint.generates:
        return 1
    for name in endpoint.limit_fields:
        outer, _, inner = name.rpartition(".")
        within = body.get(outer) if outer else body
        value = within.get(inner) if isinstance(within, dict) else None
        if type(value) is int and value > 0:
            return value
    return endpoint.default_limit
