from __future__ import annotations

import json
from typing import Any

import pytest

from hexgen_vllm.engine.server.middleware import GENERATION, HexgenMiddleware
from tests.engine.server.asgi import Application, request

COMPLETIONS = "/v1/completions"
BODY = b'{"prompt": "x"}'
STAGE = {"x-hexgen-stage": "revise"}
SNAPSHOT: dict[str, Any] = {
    "order": "slack",
    "cost": None,
    "running": 3,
    "preemptions": {"kv": 1},
    "slack_bounds_s": [0.0],
    "slack_counts": [2, 1],
}


class Core:
    """Stands for vLLM's client of the engine core, and for the client that has it."""

    def __init__(self, answer: Any = SNAPSHOT, ranks: int = 1) -> None:
        self.engine_core = self
        self.core_engines = [b"%d" % rank for rank in range(ranks)]
        self.answer = answer

    async def _call_utility_async(self, name: str, *, engine: bytes) -> Any:
        assert name == "hexgen_stats"
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("path", sorted(GENERATION))
async def test_headers_become_keys_of_the_body(path: str) -> None:
    vllm = Application()
    answer = await request(HexgenMiddleware(vllm), "POST", path, BODY, headers=STAGE)
    assert json.loads(vllm.body) == {"prompt": "x", "vllm_xargs": {"hexgen_stage": "revise"}}
    assert vllm.headers["content-length"] == str(len(vllm.body))
    assert answer.status == 200


async def test_a_body_in_pieces_is_put_together() -> None:
    vllm = Application()
    pieces = [BODY[n : n + 1] for n in range(len(BODY))]
    await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, *pieces, headers=STAGE)
    assert json.loads(vllm.body)["vllm_xargs"] == {"hexgen_stage": "revise"}


async def test_a_call_without_our_headers_is_not_touched() -> None:
    vllm = Application()
    body = b' {"prompt":"x", "vllm_xargs":{"hexgen_stage":"a"}}'
    await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, body, headers={"x-own": "1"})
    assert vllm.body == body


async def test_vllm_sees_the_disconnect_behind_the_body() -> None:
    vllm = Application()
    await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, BODY, headers=STAGE)
    assert vllm.after == {"type": "http.disconnect"}


async def test_a_client_that_leaves_early_gets_nothing_and_vllm_no_call() -> None:
    vllm = Application()
    answer = await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, headers=STAGE)
    assert (vllm.scope, answer.status) == (None, 0)


async def test_a_stream_passes_piece_by_piece() -> None:
    pieces = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
    answer = await request(
        HexgenMiddleware(Application(pieces)), "POST", COMPLETIONS, BODY, headers=STAGE
    )
    assert answer.pieces == list(pieces)
    assert answer.headers["x-own"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-hexgen-workflow-deadline-ms", "nan"),
        ("x-hexgen-workflow-deadline-ms", "-5"),
        ("x-hexgen-expected-output-tokens", "1.5"),
        ("x-hexgen-stage", "a b"),
        ("x-hexgen-workflow-id", "x" * 129),
        ("x-hexgen-nonsense", "1"),
    ],
)
async def test_a_bad_header_is_a_400_that_names_it(name: str, value: str) -> None:
    vllm = Application()
    answer = await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, BODY, headers={name: value})
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == name
    assert error["message"].startswith(name)
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert vllm.scope is None


async def test_a_bad_key_of_the_body_is_a_400_that_names_it() -> None:
    body = b'{"vllm_xargs": {"hexgen_stages_left": -1}}'
    answer = await request(HexgenMiddleware(Application()), "POST", COMPLETIONS, body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "hexgen_stages_left"


async def test_malformed_json_is_vllms_to_refuse() -> None:
    vllm = Application()
    await request(HexgenMiddleware(vllm), "POST", COMPLETIONS, b"nonsense", headers=STAGE)
    assert vllm.body == b"nonsense"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("POST", "/v1/embeddings"), ("POST", "/metrics"), ("GET", "/health")],
)
async def test_other_requests_pass_with_whatever_headers(method: str, path: str) -> None:
    vllm = Application()
    headers = {"x-hexgen-nonsense": "1"}
    answer = await request(HexgenMiddleware(vllm), method, path, b"nonsense", headers=headers)
    assert (answer.status, vllm.body) == (200, b"nonsense")


async def test_websockets_and_start_up_pass() -> None:
    vllm = Application()
    scope = {"type": "lifespan"}

    async def nothing(*_: Any) -> dict[str, Any]:
        return {}

    await HexgenMiddleware(vllm)(scope, nothing, nothing)  # type: ignore[arg-type]
    assert vllm.scope is scope


async def test_a_root_path_is_not_part_of_the_route() -> None:
    vllm = Application()
    await request(
        HexgenMiddleware(vllm), "POST", "/api/v1/completions", BODY, headers=STAGE, root_path="/api"
    )
    assert b"hexgen_stage" in vllm.body


async def test_a_body_over_the_limit_passes_unread_without_our_headers() -> None:
    vllm = Application()
    pieces = (b'{"vllm_xargs": ', b'{"hexgen_stage": ', b'"a b"}}')
    answer = await request(HexgenMiddleware(vllm, max_body_bytes=10), "POST", COMPLETIONS, *pieces)
    assert (answer.status, vllm.body) == (200, b"".join(pieces))
    assert vllm.after == {"type": "http.disconnect"}


async def test_a_body_over_the_limit_is_refused_with_our_headers() -> None:
    vllm = Application()
    pieces = (b'{"prompt": "', b'x"}', b" ")
    answer = await request(
        HexgenMiddleware(vllm, max_body_bytes=10), "POST", COMPLETIONS, *pieces, headers=STAGE
    )
    assert answer.status == 413
    assert answer.json["error"]["code"] == "body_too_large"
    assert vllm.scope is None


async def test_stats_are_the_schedulers_snapshot() -> None:
    app = HexgenMiddleware(Application())
    answer = await request(app, "GET", "/hexgen/stats", b"", engine_client=Core())
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == SNAPSHOT


@pytest.mark.parametrize("from_environment", [False, True])
async def test_stats_need_a_key_where_vllm_has_one(
    monkeypatch: pytest.MonkeyPatch, from_environment: bool
) -> None:
    app, keys = HexgenMiddleware(Application()), ["other", "sk"]
    if from_environment:
        monkeypatch.setenv("VLLM_API_KEY", "sk")
        keys = []
    for shown, status in (
        (None, 401), ("Bearer no", 401), ("Basic sk", 401), ("sk", 401), ("Bearer ", 401),
        ("Bearer sk", 200), ("bearer sk", 200),
    ):  # fmt: skip
        answer = await request(
            app, "GET", "/hexgen/stats", b"", engine_client=Core(), api_key=keys,
            headers={} if shown is None else {"authorization": shown},
        )  # fmt: skip
        assert answer.status == status, shown
        assert ("error" in answer.json) == (status == 401)


async def test_stats_of_several_ranks_are_a_list() -> None:
    app = HexgenMiddleware(Application())
    answer = await request(app, "GET", "/hexgen/stats", b"", engine_client=Core(ranks=2))
    assert answer.json == {"ranks": [SNAPSHOT, SNAPSHOT]}


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (None, 404),
        (Core(None), 404),
        (Core(RuntimeError("engine dead")), 503),
    ],
)
async def test_stats_that_cannot_be_had_are_an_error_object(client: object, status: int) -> None:
    app = HexgenMiddleware(Application())
    answer = await request(app, "GET", "/hexgen/stats", b"", engine_client=client)
    assert answer.status == status
    assert answer.json["error"]["code"] == "stats_unavailable"


async def test_metrics_get_ours_behind_vllms() -> None:
    vllm = Application((b"vllm:a 1\n", b"vllm:b 2\n"))
    headers = {"accept-encoding": "gzip", "accept": "application/openmetrics-text", "host": "h"}
    answer = await request(
        HexgenMiddleware(vllm), "GET", "/metrics", b"", headers=headers, engine_client=Core()
    )
    text = answer.body.decode()
    assert text.startswith("vllm:a 1\nvllm:b 2\n# HELP hexgen_vllm_")
    assert "hexgen_vllm_running 3\n" in text
    assert "content-length" not in answer.headers
    assert vllm.headers == {"content-length": "0", "host": "h"}


@pytest.mark.parametrize(
    ("vllm", "client"),
    [(Application(), Core(RuntimeError("engine dead"))), (Application(status=500), Core())],
)
async def test_metrics_stay_vllms_when_one_side_fails(vllm: Application, client: Core) -> None:
    app = HexgenMiddleware(vllm)
    answer = await request(app, "GET", "/metrics", b"", engine_client=client)
    assert (answer.status, answer.body) == (vllm.status, b"answer")
