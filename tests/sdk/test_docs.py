"""What docs/sdk.md claims is run against a real server: its code as it stands, its roles as an operator gives them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cloister
from cloister_server import recipients, tenants
from harness import App, Deployment

pytestmark = pytest.mark.xdist_group("docs")  # one deployment for all of them

PAGE = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text()
ROWS = 2000


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("sdk")).init().start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def steward(deployment: Deployment) -> App:
    return deployment.app(deployment.tenant("docs"), "steward")


@pytest.fixture(scope="module")
def shown(
    deployment: Deployment, steward: App, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, object]]:
    """The names that the page's blocks leave behind, run one after the other as they stand."""
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("adult"))
        write_adult(Path("adult.csv.gz"))
        write_recipient(deployment, steward, Path("recipient.txt"))
        given = {"URL": deployment.url, "CLIENT_ID": steward.client_id, "CLIENT_SECRET": steward.client_secret}
        for name, value in given.items():
            patch.setenv(f"CLOISTER_{name}", value)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "docs/sdk.md", "exec"), names)  # noqa: S102 (that is the test)
    yield names
    client = names["client"]
    assert isinstance(client, cloister.Cloister)
    client.close()


def write_adult(path: Path) -> None:
    """Rows in the form of UCI's Adult: a blank after every comma, and columns that nobody declared."""
    rng = np.random.default_rng(0)
    lines = ["age, workclass, fnlwgt, income"]
    for age, work in zip(rng.integers(17, 91, ROWS), rng.choice(["Private", "State-gov", "?"], ROWS), strict=True):
        lines.append(f"{age}, {work}, 77516, {'>50K' if age > 50 else '<=50K'}")
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n\n").encode()))


def write_recipient(deployment: Deployment, steward: App, path: Path) -> None:
    """A recipient's line, as the operator hands it out."""
    with deployment._operating() as (service, session):
        operator = tenants.operator_of(tenants.find_tenant(session, steward.tenant), request_id="docs")
        path.write_text(recipients.create(session, operator, service) + "\n")


def test_the_page_runs_as_it_stands_and_its_model_has_learned(shown: dict[str, object]) -> None:
    model = shown["model"]
    assert isinstance(model, cloister.Model)
    assert model.schema().classes == ("<=50K", ">50K") and list(model.schema().inputs) == ["age", "workclass"]
    rows = {"age": [20, 85], "workclass": ["Private", "?"]}
    assert model.predict(rows, decoded=True).tolist() == ["<=50K", ">50K"]
    assert model.predict({**rows, "workclass": np.array([0, 2])}).tolist() == [0, 1]


def test_a_predictor_sees_what_a_model_reads_and_whoever_may_not_predict_does_not(
    deployment: Deployment, steward: App, shown: dict[str, object]
) -> None:
    partner = deployment.app(steward.tenant, "partner", role="predictor")
    with deployment.client(partner) as client:
        model = client.models.get("income")
        assert model.schema().classes == ("<=50K", ">50K")
        assert model.predict_proba({"age": [20], "workclass": ["?"]}).shape == (1, 2)
        with pytest.raises(cloister.NotFound):
            client.datasets.get("adult")
    reader = deployment.app(deployment.tenant("elsewhere"), "reader", role="predictor")
    grant = ("grant", "add", "--tenant", steward.tenant, "--to", reader.client_id, "--verb", "model.read")
    deployment.admin(*grant, "--resource", model.id)
    with deployment.client(reader) as client:
        with pytest.raises(cloister.PermissionDenied, match=r"model\.predict"):
            client.models.get(model.id).schema()
        with pytest.raises(cloister.NotFound):
            client.models.get("income")


def test_a_name_is_not_burned_by_an_upload_that_could_not_fit(deployment: Deployment, steward: App) -> None:
    columns = {"x": cloister.Number(low=0, high=1), "y": cloister.Category(values=("a", "b"))}
    given = {"columns": columns, "nominal_size": 10, "capacity": 20}
    with deployment.client(steward) as client:
        client.sources.create("careless", epsilon=1, delta=1e-5)
        for wrong in ("nope.csv", {"x": [2], "y": ["a"]}, {"x": [1], "z": ["a"]}, {"x": [1], "y": ["c"]}):
            with pytest.raises(cloister.RowsNotFit):
                client.datasets.upload("once", wrong, source="careless", **given)
        with pytest.raises(cloister.NotFound):
            client.datasets.get("once")
        assert client.datasets.upload("once", {"x": [1], "y": ["a"]}, source="careless", **given).status == "ready"


def test_the_roles_and_verbs_of_the_page_are_the_server_s() -> None:
    from cloister_server.grants import ROLES
    from cloister_server.store.queries import VERBS

    told = dict(re.findall(r"^\| [^|]+ \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert told.keys() == ROLES.keys() and (told.pop("steward"), told["none"]) == ("every verb", "no verb")
    for role, verbs in told.items():
        assert set(re.findall(r"`([\w.]+)`", verbs)) == set(ROLES[role])
    assert set(re.findall(r"`((?:source|dataset|model|job|weights)\.\w+)`", PAGE)) <= set(VERBS)


@pytest.mark.long
def test_wait_outlives_a_restart_of_the_real_server(deployment: Deployment, shown: dict[str, object]) -> None:
    client = shown["client"]
    assert isinstance(client, cloister.Cloister)
    plan = client.plan("adult", target="income", privacy=cloister.DP(epsilon=1), epochs=1)
    job = client.train(plan, model="again")
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(job.wait, timeout_s=120)
        deployment.stop()
        deployment.start()
        assert watching.result().name == "again"
