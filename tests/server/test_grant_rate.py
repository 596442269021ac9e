"""A grant's requests a minute: counted over all processes, kept to by the writer of one database, refused with the time to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import event, func, select
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import deployment, grants, policy, shredding
from cloister_server.errors import RateLimited
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import for_principal
from cloister_server.store.conditions import Conditions
from cloister_server.store.queries import ANY
from cloister_server.store.session import reading
from cloister_server.store.tables import GrantCount, Tenant
from server.conftest import Client, MinuteClock


def let(service: Service, client: Client, verb: str, *, per_minute: int | None) -> str:
    """The grant, of the client's own tenant, by which it may do so to anything so often."""
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    with asked_writing(service) as session:
        bound = Conditions(requests_per_minute=per_minute)
        return grants.add(session, operator, to=client.id, verb=verb, resource_id=ANY, conditions=bound).id


def passed(service: Service, client: Client, *, most: int = 10_000) -> int:
    """How many decisions go well in this process before one is refused."""
    principal = client.principal

    def decide(session: Any) -> None:
        policy.authorize(session, principal, "weights.create", session.get_one(Tenant, client.tenant_id))

    for number in range(most):
        try:
            service.read(for_principal(principal), decide)
        except RateLimited:
            return number
    return most


def counts(service: Service) -> int:
    with reading(service.engine) as session:
        return session.scalar(select(func.count()).select_from(GrantCount)) or 0


@pytest.fixture
def bounded(service: Service, make_client: Callable[..., Client]) -> Callable[[int], Client]:
    """Makes a client that may do one thing, so often."""

    def make(per_minute: int) -> Client:
        client = make_client(role="none")
        let(service, client, "weights.create", per_minute=per_minute)
        return client

    return make


@pytest.fixture
def others(service: Service) -> Iterator[list[Service]]:
    """Two processes more of the deployment, as far as it can tell."""
    opened = [deployment.open_service(service.settings) for _ in range(2)]
    yield opened
    for each in opened:
        each.engine.dispose()


def test_processes_in_turn_pass_what_the_grant_says_and_again_in_the_next_minute(
    service: Service, others: list[Service], bounded: Callable[[int], Client], clock: MinuteClock
) -> None:
    client = bounded(3)
    assert [passed(each, client, most=2) for each in (service, *others)] == [2, 1, 0]
    clock.at += 59
    assert [passed(each, client) for each in (service, *others)] == [0, 0, 0]
    clock.at += 1
    assert [passed(each, client) for each in (*others, service)] == [3, 0, 0]


@pytest.mark.parametrize("per_minute", [1, 100])
def test_threads_of_processes_that_ask_at_once_pass_just_as_many_as_the_grant_says(
    service: Service, others: list[Service], bounded: Callable[[int], Client], clock: MinuteClock, per_minute: int
) -> None:
    client, barrier = bounded(per_minute), Barrier(6)

    def ask(process: Service) -> int:
        barrier.wait()
        return passed(process, client)

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, [service, *others] * 2)) == per_minute


def test_counting_writes_seldom(service: Service, bounded: Callable[[int], Client], clock: MinuteClock) -> None:
    client, writes = bounded(1000), list[str]()

    def note(*told: Any) -> None:
        if told[2].startswith(("UPDATE", "INSERT")):
            writes.append(told[2])

    event.listen(service.engine, "before_cursor_execute", note)
    assert passed(service, client) == 1000
    assert 0 < len(writes) < 100


def test_each_grant_has_its_own_and_one_without_a_bound_has_no_count(
    service: Service, bounded: Callable[[int], Client], clock: MinuteClock
) -> None:
    one, other = bounded(2), bounded(5)
    assert (passed(service, one), passed(service, other)) == (2, 5)
    let(service, one, "weights.create", per_minute=None)
    assert passed(service, one, most=20) == 20, "it is bound least, and so decides"
    assert counts(service) == 2


def test_writes_and_reads_are_refused_with_the_time_to_wait_and_are_not_done(
    service: Service,
    http: TestClient,
    make_client: Callable[..., Client],
    bearer_of: Callable[..., dict[str, str]],
    clock: MinuteClock,
) -> None:
    client = make_client(role="none")
    bearer = bearer_of(client)
    let(service, client, "source.create", per_minute=2)
    clock.at += 18.5

    def create(name: str) -> Any:
        asked = {"name": name, "epsilon": 1, "delta": 1e-5}
        return http.post("/v1/sources", headers={**bearer, "Idempotency-Key": name}, json=asked)

    assert [create(name).status_code for name in ("one", "two", "three")] == [201, 201, 429]
    refusal = create("three")
    assert refusal.headers["Retry-After"] == "42" and refusal.json()["code"] == "rate_limited"
    assert refusal.json()["details"] == {"requests_per_minute": 2, "retry_after_s": 42}
    listed = http.get("/v1/sources", headers=bearer).json()["items"]
    assert [each["name"] for each in listed] == ["one", "two"]
    clock.at += 42
    assert create("three").status_code == 201, "the key was not used up by what was refused"


def test_a_count_goes_with_its_grant_and_with_its_tenant(
    service: Service, bounded: Callable[[int], Client], make_client: Callable[..., Client], clock: MinuteClock
) -> None:
    client, stays = bounded(2), make_client("other", role="none")
    let(service, stays, "weights.create", per_minute=2)
    again = let(service, client, "weights.create", per_minute=3)
    assert (passed(service, client), passed(service, stays)) == (3, 2)
    assert counts(service) == 2, "of the two that the one has, one decides"
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    with asked_writing(service) as session:
        grants.remove(session, operator, again)
    assert counts(service) == 1
    assert passed(service, client) == 2, "the other one decides now, and has a minute of its own"
    shredding.shred(service, operator)
    with reading(service.engine) as session:
        assert session.scalars(select(GrantCount.tenant_id)).all() == [stays.tenant_id]
