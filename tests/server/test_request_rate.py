"""A tenant's requests a minute: counted over its principals and all processes, refused with the time to wait.

That processes which ask at once pass no more than is allowed is in `test_quotas`, on both databases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from accounts import requests_passed
from cloister_server import deployment, quotas, request_rate
from cloister_server.errors import RateLimited
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.session import writing
from cloister_server.store.tables import RequestCount
from server.conftest import MINUTE, MinuteClock


def bound(service: Service, tenant_id: str, allowed: int | None) -> None:
    with writing(service.engine) as session:
        operator = Principal.operator(tenant_id, request_id="r")
        quotas.set_quotas(session, operator, {"requests_per_minute": allowed})


def test_a_tenant_is_refused_with_the_time_to_wait_and_others_are_not(
    service: Service,
    http: TestClient,
    make_client: Callable[..., Any],
    bearer_of: Callable[..., dict[str, str]],
    clock: MinuteClock,
) -> None:
    first, second, other = make_client(), make_client(), make_client("other")
    bearers = [bearer_of(each) for each in (first, second, other)]

    def ask(who: int, path: str = "/v1/whoami") -> Any:
        return http.get(path, headers=bearers[who])

    assert [ask(0).status_code for _ in range(3)] == [200] * 3, "without a quota"
    bound(service, first.tenant_id, 5)
    clock.at += 18.5
    assert [ask(number % 2).status_code for number in range(5)] == [200] * 5
    for who, path in ((0, "/v1/whoami"), (1, "/v1/sources"), (1, "/v2/models/m/ready")):
        answer = ask(who, path)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "42", "of all its apps, on every path"
        body = answer.json()
        assert body["code"] == "request_quota_exceeded" and body["details"] == {"retry_after_s": 42}
        assert "try again in 42 s" in body["error"]
    assert ask(2).status_code == 200, "another tenant's requests are its own"
    assert http.get("/healthz").status_code == 200 and bearer_of(first), "what wants no token is not counted"
    clock.at += 42
    assert [ask(0).status_code for _ in range(6)] == [200] * 5 + [429], "the next minute"
    clock.at += 61 * 60
    assert ask(0).status_code == 200, "and any later one"
    bound(service, first.tenant_id, 2)
    clock.at += 1
    assert [ask(0).status_code for _ in range(2)] == [200, 429], "what it had sent counts"
    bound(service, first.tenant_id, None)
    clock.at += 1
    assert {ask(0).status_code for _ in range(20)} == {200}, "lifted within a second"


def test_counting_writes_seldom_and_a_tenant_without_a_quota_never(
    service: Service, make_client: Callable[..., Any], clock: MinuteClock
) -> None:
    bounded, free = make_client().tenant_id, make_client("other").tenant_id
    bound(service, bounded, 1000)
    writes: list[str] = []

    def note(*told: Any) -> None:
        if told[2].startswith("UPDATE"):
            writes.append(told[2])

    event.listen(service.engine, "before_cursor_execute", note)
    for _ in range(50):
        if not request_rate.admit_from_memory(service, free):
            request_rate.admit(service, free)
        clock.at += 0.1
    assert writes == []
    clock.at = (MINUTE + 1) * 60.0
    assert requests_passed(service, bounded) == 1000
    assert 0 < len(writes) < 100


def test_a_tenant_without_a_quota_is_looked_up_once_a_second_however_long_it_goes_on(
    service: Service, make_client: Callable[..., Any], clock: MinuteClock
) -> None:
    free = make_client().tenant_id
    looked_up: list[int] = []
    for second in range(5):
        for _ in range(10):
            if not request_rate.admit_from_memory(service, free):
                request_rate.admit(service, free)
                looked_up.append(second)
        clock.at += 1.5
    assert looked_up == [0, 1, 2, 3, 4]


def test_what_an_idle_process_has_taken_is_a_small_part_and_comes_back_with_the_next_minute(
    service: Service, make_client: Callable[..., Any], clock: MinuteClock
) -> None:
    tenant_id = make_client().tenant_id
    bound(service, tenant_id, 160)
    idle = deployment.open_service(service.settings)
    request_rate.admit(idle, tenant_id)
    assert requests_passed(service, tenant_id) == 150, "nine are left to the idle one"
    assert [request_rate.admit_from_memory(idle, tenant_id) for _ in range(10)] == [True] * 9 + [False]
    clock.at += 60
    assert not request_rate.admit_from_memory(service, tenant_id), "a refusal ends with its minute"
    assert requests_passed(service, tenant_id) == 160
    idle.engine.dispose()


def test_clocks_that_are_apart_count_one_minute_and_one_that_was_wrong_blocks_nobody(
    service: Service, make_client: Callable[..., Any], clock: MinuteClock
) -> None:
    tenant_id = make_client().tenant_id
    bound(service, tenant_id, 3)
    ahead = deployment.open_service(service.settings)
    clock.at += 60.5
    assert requests_passed(ahead, tenant_id) == 3
    clock.at -= 1
    with pytest.raises(RateLimited) as told:
        request_rate.admit(service, tenant_id)
    assert told.value.details == {"retry_after_s": 60}, "a minute at most, whatever the clocks say"
    with writing(service.engine) as session:
        session.get_one(RequestCount, tenant_id).minute = MINUTE + 10_000
    clock.at += 1.5
    assert requests_passed(service, tenant_id) == 3
    clock.at -= 3600
    assert requests_passed(service, tenant_id) == 3, "nor does a clock that is put back"
    ahead.engine.dispose()
