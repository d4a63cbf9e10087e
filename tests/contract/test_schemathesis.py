"""Requests that schemathesis makes of the document: well-formed and not, with each scope and none.

Each is answered as the document says, none by a bug, and the engine comes out of it all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from engine_plugins.admin.routes import SCOPES
from tests.support.configurations import DENSE, OLD, on
from tests.support.documented import document, undocumented
from tests.support.served import Served

pytestmark = on(DENSE)

CASES = 150
"""For each scope: some 4 of each operation, well-formed and not, in a few seconds."""
SEEN = {None: {401}, "read": {200, 403}, "control": {200, 400, 403}, "weights": {400, 403, 404}}
"""At least."""
TOKENS = {scope: f"a-token-of-{scope}-alone" for scope in ("read", "control", "weights")}


@schemathesis.serializer("application/msgpack")
def _plain(_: object, value: Any) -> bytes:
    """Bytes as they are; the document says no more of them, so what else is made up is text."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def _cases() -> st.SearchStrategy[Any]:
    schema = schemathesis.openapi.from_dict(document())
    schema.validate()
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == len(SCOPES)
    kinds: list[st.SearchStrategy[Any]] = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


@pytest.fixture
def attacked(served: Served) -> Iterator[Served]:
    """The server with one token for each scope; afterwards it serves, and the right weights."""
    served.restore(OLD)
    lines = "".join(f"{scope} {token}\n" for scope, token in TOKENS.items())
    served.write_tokens("read", "control", "weights", more=lines)
    gate = served.server.admin.get("/prefill-gate").json()["settings"]
    yield served
    served.write_tokens("read", "control", "weights")
    put_back = served.server.admin.patch("/prefill-gate", json=gate)
    assert put_back.status_code == 200, put_back.text
    state = served.server.state()
    assert state["fence"] is None
    assert state["update"] is None
    served.restore(OLD)
    assert served.server.state()["state"] == "serving"


@pytest.mark.parametrize("scope", [None, *TOKENS])
def test_every_answer_is_one_of_the_documents(attacked: Served, scope: str | None) -> None:
    url = f"{attacked.server.url}/admin/v1"
    authorization = {} if scope is None else {"authorization": f"Bearer {TOKENS[scope]}"}
    statuses = Counter[int]()

    with httpx.Client(timeout=60) as client:

        @given(case=_cases())
        @settings(
            max_examples=CASES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def attack(case: Any) -> None:
            answer = client.send(_request(client, case, url, authorization))
            told = f"{case.method} {case.path} {case.body!r:.500}: {answer.text[:500]}"
            fault = undocumented(answer)
            assert not fault, f"{fault} to {told}"
            assert answer.status_code != 500, told
            statuses[answer.status_code] += 1

        attack()
    assert statuses.total() >= CASES / 2
    assert SEEN[scope] <= set(statuses), statuses
    assert scope is not None or set(statuses) == SEEN[scope]


def _request(
    client: httpx.Client, case: Any, url: str, authorization: dict[str, str]
) -> httpx.Request:
    """The case as a request, with the token in place of what was made up for one."""
    plain = case.as_transport_kwargs(base_url=url)
    headers = {
        name: value
        for name, value in plain["headers"].items()
        if name.lower() not in ("authorization", "content-length", "transfer-encoding")
    }
    content = {"json": plain["json"]} if plain.get("json") is not None else {}
    if not content and plain.get("data") is not None:
        content = {"content": plain["data"]}
    return client.build_request(
        plain["method"],
        plain["url"],
        params=plain.get("params"),
        headers=headers | authorization,
        **content,
    )
