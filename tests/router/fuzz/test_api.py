"""The HTTP interface as its OpenAPI document describes it, tried by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hexgen_vllm.router.routes import public
from hexgen_vllm.router.status import pages
from tests.router.fuzz.budget import budget
from tests.router.fuzz.live import Live

pytestmark = pytest.mark.slow

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(pages.openapi_document(public()))
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
KEY = "admin"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A router that takes no engine from outside, so that the one it has stays."""
    opened = Live(
        admin_api_key=(KEY,),
        worker_allowed_hosts=("nowhere.invalid",),
        batch_dir=str(tmp_path_factory.mktemp("batches")),
    )
    opened.start()
    yield opened
    opened.stop()


def keeps_the_engine(case: Case) -> bool:
    """Whether the router has its engine after ``case``."""
    return "{name}" not in case.path or case.path_parameters.get("name") != "engine-0"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
def test_answers_are_as_described(live: Live, operation: schemathesis.APIOperation) -> None:
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @budget(5)
    @given(case=cases)
    def every(case: Case) -> None:
        if not keeps_the_engine(case):
            return
        base = f"http://127.0.0.1:{live.router.port}"
        answer = case.call(base_url=base, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        case.validate_response(answer, checks=CHECKS)

    every()
    live.assert_well()
