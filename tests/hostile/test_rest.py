"""The REST API against its OpenAPI description: valid and invalid requests by schemathesis on a live server."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from rest_client import Rest
from schemathesis.engine import events, from_schema
from server_process import Process
from target import EXAMPLES
from test_server import make_data, make_token

_LIMITS = {"limits": {"new_connections_per_second": 1_000_000, "failed_logins_per_minute": 1_000_000}}
_SECONDS = max(10, EXAMPLES // 10)
_TEXTS = {"include-path-regex": "/(plans|notes)/", "include-method": "PUT"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    data = make_data(tmp_path / "data")
    (data.path / "config.json").write_text(json.dumps(_LIMITS))
    started = Process(data)
    yield started
    assert started.end() == 0


def config(port: int, token: str) -> schemathesis.Config:
    """All checks. A valid request may still be refused by lattice (422) or for the current state (409, 412)."""
    lattices = ["2xx", "304", "403", "404", "409", "412", "422"]
    return schemathesis.Config.from_dict(
        {
            "seed": int(os.environ.get("SEED", "1")),
            "max-time": _SECONDS,
            "base-url": f"http://127.0.0.1:{port}",
            "headers": {"Authorization": f"Bearer {token}"},
            "parameters": {"slug": "web"},
            "suppress-health-check": ["all"],
            "generation": {"max-examples": max(3, EXAMPLES // 20), "database": "none"},
            "checks": {
                "positive_data_acceptance": {"expected-statuses": lattices},
                "negative_data_rejection": {"expected-statuses": ["4xx"]},
            },
            # A method without a body is refused for its body before the server checks that the method exists.
            "phases": {"coverage": {"unexpected-methods": ["PUT", "PATCH", "POST"]}},
            # Any body is a text.
            "operations": [{**_TEXTS, "checks": {"negative_data_rejection": {"enabled": False}}}],
        }
    )


def test_the_description_agrees_with_the_responses(server: Process) -> None:
    token = make_token(server.data)
    rest = Rest(server.port, token)
    with rest.session:
        for _ in range(3):
            rest.task(planned=True)
        rest.ok("POST", "/resources/gpu", status=201)
    whole = schemathesis.openapi.from_url(f"{rest.root}/openapi.json", config=config(server.port, token))
    schema = whole.exclude(path_regex="/events/stream$|^/metrics$")  # one never ends, one needs another token
    answered: Counter[Any] = Counter()
    failures: dict[str, str] = {}
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            recorded = event.recorder
            answered.update(one.response.status_code for one in recorded.interactions.values() if one.response)
            checks = [check for made in recorded.checks.values() for check in made if check.failure_info is not None]
            failures |= {f"{recorded.label}: {check.name}": str(check.failure_info) for check in checks}
    print(f"{sum(answered.values())} requests in at most {_SECONDS} s: {dict(answered.most_common())}")
    assert not failures, "\n".join(f"{what}\n  {why[:2000]}" for what, why in failures.items())
    assert answered[200] and answered[422], "too little was asked to say anything"
    assert not {status for status in answered if status >= 500}
