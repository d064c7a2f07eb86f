"""What engines have and the router does not know is passed on, but for what manages an engine."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from yarl import URL

from hexgen_vllm.router.calls.intake import form_field
from hexgen_vllm.router.endpoints import ENDPOINT_NAMES, MORE_ENDPOINTS
from hexgen_vllm.router.routes import manages
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

KNOWN = tuple(one.path for one in MORE_ENDPOINTS if one.name != "tokenize")
AUDIO = "/v1/audio/transcriptions"
UNKNOWN = (AUDIO, "/v1/audio/translations", "/v2/embed", "/v3/anything/at/all", "/x")
ECHOES = (*KNOWN, *UNKNOWN)
A = FakeSettings(models=("a",), echoes=ECHOES)
B = FakeSettings(models=("b",), echoes=ECHOES)


def counted(stand: Stand) -> dict[tuple[str, str], int]:
    return {key: n for key, n in stand.context.ledger.ended.items() if n}


@pytest.mark.parametrize("path", ECHOES)
async def test_posts_go_to_an_engine_that_has_the_model_and_are_counted(path: str) -> None:
    async with open_stand(A, B) as stand:
        for i, model in enumerate(("a", "b")):
            body = {"model": model, "query": "q", "documents": ["d"], "input": "x"}
            async with stand.client.post(stand.router.url + path, json=body) as answer:
                assert answer.status == 200
                assert answer.headers["x-hexgen-engine"] == f"engine-{i}"
                assert (await answer.json())["path"] == path
            (got,) = stand.engines[i].received
            assert json.loads(got.body) == body
        name = next((e.name for e in MORE_ENDPOINTS if e.path == path), "other")
        assert counted(stand) == {(name, "answered"): 2}
        assert name in ENDPOINT_NAMES
        stand.assert_settled()


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_methods_queries_and_bodies_stay(method: str) -> None:
    async with open_stand(A) as stand:
        url = URL(f"{stand.router.url}/x?a=b%2Fc&d", encoded=True)
        data = None if method == "GET" else b"\x00\xff anything"
        async with stand.client.request(method, url, data=data) as answer:
            assert answer.status == 200
        (got,) = stand.received()
        assert (got.method, got.path, got.body) == (method, "/x?a=b%2Fc&d", data or b"")


async def test_the_model_of_a_form_counts() -> None:
    async with open_stand(A, B) as stand:
        for i, model in enumerate(("a", "b")):
            form = aiohttp.FormData()
            form.add_field("file", b'RIFF\r\n\r\nname="model"\r\n' * 999, filename="m.wav")
            form.add_field("model", model)
            async with stand.client.post(stand.router.url + AUDIO, data=form) as answer:
                assert answer.status == 200
                assert answer.headers["x-hexgen-engine"] == f"engine-{i}"
        form = aiohttp.FormData({"model": "none"})
        async with stand.client.post(stand.router.url + AUDIO, data=form) as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "model_not_found"


MULTIPART = "multipart/form-data; boundary=b"
URL_ENCODED = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("kind", "raw", "found"),
    [
        (MULTIPART, b'--b\r\nx: y; name="model"\r\n\r\nm\r\n--b--', "m"),
        (MULTIPART.replace("b", "B", 1), b"--b\r\nx: y; name=model\r\n\r\nm\r\n--b--", "m"),
        ('multipart/x; Boundary="b c"', b"--b c\r\nx: y; name=model\r\n\r\nm\r\n--b c--", "m"),
        (MULTIPART, b'--b\r\nx: y; filename="model"\r\n\r\nm\r\n--b--', None),
        (MULTIPART, b'--b\r\nname="file"\r\n\r\nname="model"\r\n--b--', None),
        (MULTIPART, b"--b", None),
        (MULTIPART, b"", None),
        ("multipart/form-data", b"", None),
        (URL_ENCODED, b"a=b&model=m%2Fn&c", "m/n"),
        (URL_ENCODED, b"\xff=&&&", None),
    ],
)
def test_fields_of_forms(kind: str, raw: bytes, found: str | None) -> None:
    assert form_field(kind, raw, "model") == found


async def test_without_a_model_any_engine_will_do() -> None:
    async with open_stand(A, B) as stand:
        for body in (b"", b"no json", b'{"model": 7}', b"[1]"):
            async with stand.client.post(stand.router.url + "/x", data=body) as answer:
                assert answer.status == 200
        assert [one.body for one in stand.received()] == [b"", b"no json", b'{"model": 7}', b"[1]"]


async def test_what_no_engine_has_is_for_the_engine_to_say() -> None:
    async with open_stand(A) as stand:
        for method in ("GET", "POST"):
            async with stand.client.request(method, stand.router.url + "/v1/nothing") as answer:
                assert answer.status == 404
                assert answer.headers["x-hexgen-engine"] == "engine-0"
                assert "error" in await answer.json()
        assert counted(stand) == {("other", "bad-request"): 2}


async def test_streams_of_unknown_endpoints_pass() -> None:
    async with open_stand(A) as stand:
        async with stand.client.post(stand.router.url + "/x?stream") as answer:
            assert (await answer.read()).count(b"data: ") == A.default_tokens
        stand.engines[0].faults.append(Fault("reset", after=3))
        async with stand.client.post(stand.router.url + "/x?stream") as answer:
            assert b"engine-lost" in await answer.read()
        assert counted(stand) == {("other", "answered"): 1, ("other", "engine-lost"): 1}
        stand.assert_settled()


async def test_heads_get_no_body() -> None:
    async with open_stand(A) as stand:
        for query in ("", "?stream"):
            async with stand.client.head(stand.router.url + "/x" + query) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
        async with stand.client.get(stand.router.url + "/x") as answer:
            assert (await answer.json())["method"] == "GET"
        stand.assert_settled()


@pytest.mark.parametrize("kind", ["reset", "close", "garbage"])
@pytest.mark.parametrize(("method", "path", "tries"), [
    ("POST", "/x", 1), ("DELETE", "/x", 1), ("GET", "/x", 2), ("POST", "/rerank", 2),
])  # fmt: skip
async def test_only_what_is_safe_is_sent_again(
    kind: Any, method: str, path: str, tries: int
) -> None:
    both = FakeSettings(echoes=ECHOES)
    async with open_stand(both, both) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault(kind))
        async with stand.client.request(method, stand.router.url + path, data=b"{}") as answer:
            assert answer.status == 502
        assert len(stand.received()) == tries


async def test_what_an_engine_has_not_begun_goes_to_another_one() -> None:
    both = FakeSettings(echoes=ECHOES)
    async with open_stand(both, both) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("status", status=503))
            break
        for _ in range(2):
            async with stand.client.post(stand.router.url + "/x") as answer:
                assert answer.status == 200


async def test_errors_of_unknown_endpoints_take_no_engine_down() -> None:
    both = FakeSettings(echoes=ECHOES)
    async with open_stand(both, both, cb_failure_threshold=2) as stand:
        for engine in stand.engines:
            engine.fault = Fault("status", status=500)
        for _ in range(12):
            async with stand.client.post(stand.router.url + "/x") as answer:
                assert answer.status == 502
        assert all(engine.takes_calls for engine in stand.context.fleet.engines.values())


@pytest.mark.parametrize(
    ("location", "shown"),
    [("{url}/x/?q=1", "/x/?q=1"), ("/x/", "/x/"), ("http://other.example/", None), ("//o/", None),
     ("{url}//o/", None), ("x", None)],
)  # fmt: skip
async def test_redirects_within_an_engine_are_shown_without_its_address(
    location: str, shown: str | None
) -> None:
    async with open_stand(A) as stand:
        engine = stand.engines[0]
        to = location.format(url=engine.url)
        engine.fault = Fault("status", status=307, body=b"", headers=(("Location", to),))
        url = stand.router.url + "/x"
        async with stand.client.get(url, allow_redirects=False) as answer:
            assert answer.headers.get("Location") == shown
            assert answer.status == (502 if shown is None else 307)


MANAGING = (
    "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/collective_rpc",
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory",
    "/server_info", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/update_weights",
    "/init_weight_transfer_engine", "/start_profile", "/stop_profile", "/abort_requests",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests",
    "/fault_tolerance/apply", "/kv_event_sources", "/get_world_size", "/hexgen/stats",
    "/flush_cache", "/update_weights_from_disk", "/release_memory_occupation", "/adapters/x",
)  # fmt: skip
DISGUISES = ("{}", "{}/", "/{}", "{}//", "/%2f{}", "/x/..{}", "/.{}", "/v1{}", "{}?a=/x", "{};x")


@pytest.mark.parametrize("path", MANAGING)
async def test_what_manages_an_engine_is_not_passed_on(path: str) -> None:
    coded = "/" + "".join(f"%{ord(c):02x}" if c.isalpha() else c for c in path[1:])
    twice = coded.replace("%", "%25")
    targets = [form.format(path) for form in DISGUISES] + [coded, twice, path.upper()]
    async with open_stand(FakeSettings(echoes=(path,)), admin_api_key=("a",)) as stand:
        url = stand.router.url
        for method in ("GET", "POST"):
            for target in targets:
                raw = URL(url + target, encoded=True)
                headers = {"Authorization": "Bearer a"}
                async with stand.client.request(method, raw, headers=headers) as answer:
                    assert answer.status == 403, target
                    assert (await answer.json())["error"]["code"] == "engine_endpoint"
        assert not [one for one in stand.received() if "Authorization" in one.headers]


def test_what_clients_use_manages_nothing() -> None:
    for path in (*ECHOES, "/v1/chat/completions/batch", "/v1/completions/render", "/invocations",
                 "/tokenizer_info", "/generative_scoring", "/cohere/v2/chat", "/v1/systemone",
                 "/docs", "/v1/files", "/v1/batches", "/v1/images/generations"):  # fmt: skip
        assert not manages(path), path


async def test_keys_are_asked_for_first() -> None:
    async with open_stand(A, api_key=("k",)) as stand:
        for path in ("/x", "/sleep", "/nothing"):
            async with stand.client.post(stand.router.url + path) as answer:
                assert answer.status == 401
        assert stand.received() == []


@pytest.mark.parametrize("path", ["/v1/realtime", "/x"])
async def test_websockets_are_refused_with_a_sentence(path: str) -> None:
    async with open_stand(A) as stand:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await stand.client.ws_connect(stand.router.url + path)
        assert caught.value.status == 501
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        async with stand.client.get(stand.router.url + path, headers=headers) as answer:
            assert "WebSocket" in (await answer.json())["error"]["message"]
        assert stand.received() == []


async def test_large_bodies_have_the_same_limit() -> None:
    async with open_stand(A, max_payload_size=100) as stand:
        async with stand.client.post(stand.router.url + "/x", data=b"x" * 101) as answer:
            assert answer.status == 413
        assert stand.received() == []
