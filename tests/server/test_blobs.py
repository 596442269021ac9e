"""Sealed bytes in files and in a bucket: created once, whole or not at all, and every refusal of a store has a name."""

from __future__ import annotations

import errno
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from asked import asked_reading
from cloister_server import vault
from cloister_server.errors import StartRefused, Unavailable
from cloister_server.service import Service
from cloister_server.settings import Settings, load_settings
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.blobs import Blobs
from cloister_server.store.tables import SealedObject, new_id
from key_providers import ACCOUNT, FAULTS, SLOW, Faulty, kms_server, served

BUCKET = "sealed-objects"
SECRET = "a-secret-access-key-of-tests"


def in_files(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", key_dir=tmp_path / "keystore")


def in_bucket(endpoint: str, tmp_path: Path, *, prefix: str = "a/b", timeout_s: int = 60) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        key_dir=tmp_path / "keystore",
        blob_url=f"s3://{BUCKET}/{prefix}",
        blob_endpoint=endpoint,
        blob_region=ACCOUNT["region"],
        blob_access_key_id=ACCOUNT["access_key_id"],
        blob_secret_access_key=SecretStr(SECRET),
        blob_timeout_s=timeout_s,
    )


def bucket_client(url: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name=ACCOUNT["region"],
        aws_access_key_id=ACCOUNT["access_key_id"],
        aws_secret_access_key=SECRET,
    )


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real moto server, with the bucket."""
    with kms_server(tmp_path_factory.mktemp("moto")) as url:
        bucket_client(url).create_bucket(
            Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": ACCOUNT["region"]}
        )
        yield url


@pytest.fixture(params=["files", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "files":
        return in_files(tmp_path)
    return in_bucket(request.getfixturevalue("s3"), tmp_path, prefix=f"p/{secrets.token_hex(4)}")


@pytest.fixture
def blobs(settings: Settings) -> Blobs:
    return Blobs.open_at(settings)


def stored(blobs: Blobs) -> dict[str, int]:
    return {each.name: each.size for page in blobs.pages() for each in page}


def code_of(work: Callable[[], Any]) -> str:
    with pytest.raises(Unavailable) as refusal:
        work()
    assert len(refusal.value.message) > 40
    return refusal.value.code


TENANT = "tn_" + "7" * 32


def test_an_object_is_created_once_read_listed_and_deleted(blobs: Blobs) -> None:
    one, two, content = new_id("obj"), new_id("obj"), secrets.token_bytes(3_000_000)
    blobs.put(TENANT, one, content)
    blobs.put(TENANT, two, b"")
    assert code_of(lambda: blobs.put(TENANT, one, b"another")) == "storage_conflict"
    assert blobs.get(TENANT, one) == content and blobs.get(TENANT, two) == b""
    sealed = blobs.sealed(TENANT, one)
    assert (sealed.read_bytes() if isinstance(sealed, Path) else sealed) == content
    assert stored(blobs) == {one: len(content), two: 0}
    blobs.delete(TENANT, one, new_id("obj"))
    assert stored(blobs) == {two: 0}
    for ask in (blobs.get, blobs.sealed):
        assert code_of(lambda ask=ask: ask(TENANT, one)) == "storage_missing"  # type: ignore[misc]  # a bound default


def test_many_objects_of_several_tenants_come_in_pages_of_one_tenant_each(blobs: Blobs) -> None:
    put = {(tenant, new_id("obj")) for tenant in (TENANT, "tn_" + "8" * 32) for _ in range(7)}
    for tenant, each in put:
        blobs.put(tenant, each, b"x")
    pages = list(blobs.pages())
    assert {(each.tenant_id, each.object_id) for page in pages for each in page} == put
    assert all(len({each.tenant_id for each in page}) == 1 for page in pages)


def test_what_is_not_of_our_naming_is_left_out(tmp_path: Path) -> None:
    blobs = Blobs.open_at(in_files(tmp_path))
    root = tmp_path / "data" / "objects"
    for path in ("README", f"{TENANT}/notes.txt", f"other/{new_id('obj')}", f"{TENANT}/{new_id('obj')}#x"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"somebody else's")
    assert stored(blobs) == {}


ODD = ["a//b", "//b", "./b", f"{TENANT}//b", f"{TENANT}/./b", f"{TENANT}/zz//b", "notes.txt"]


@pytest.mark.parametrize("odd", ODD)
def test_a_name_that_cannot_be_read_stops_no_listing_and_is_told(odd: str, s3: str, tmp_path: Path) -> None:
    prefix = secrets.token_hex(8)
    blobs, told = Blobs.open_at(in_bucket(s3, tmp_path, prefix=prefix)), list[str]()
    ours = {new_id("obj"): 1 for _ in range(3)}
    for each in ours:
        blobs.put(TENANT, each, b"x")
    bucket_client(s3).put_object(Bucket=BUCKET, Key=f"{prefix}/{odd}", Body=b"somebody else's")
    found = [each for page in blobs.pages(TENANT, on_odd=told.append) for each in page]
    assert {each.name: each.size for each in found} == ours and len(found) == len(ours)
    blobs.tenants(on_odd=told.append)
    assert any(odd.split("/")[0] in each for each in told)


_WRITER = """
import os, sys
from cloister_server.settings import Settings
from cloister_server.store.blobs import Blobs
from cloister_server.store.tables import new_id
blobs, content = Blobs.open_at(Settings.model_validate_json(sys.stdin.readline())), b"x" * int(sys.argv[1])
print("writing", flush=True)
while True:
    blobs.put(sys.argv[2], new_id("obj"), content)
"""


def test_a_killed_process_leaves_no_partial_object_under_a_name_and_what_it_leaves_is_listed(tmp_path: Path) -> None:
    settings, size = in_files(tmp_path), 48 * 2**20
    blobs = Blobs.open_at(settings)
    partial, attempt = 0, 0
    while attempt < 6 or not (partial or attempt == 60):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(size), TENANT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(settings.dump_with_secrets().encode() + b"\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == b"writing\n"
        while not any((tmp_path / "data" / "objects" / TENANT).glob("*")):
            time.sleep(0.001)
        time.sleep(0.013 * (attempt % 6))
        attempt += 1
        writer.kill()
        writer.communicate()
        for name, length in stored(blobs).items():
            assert "#" in name or length == size, "an object is whole, or is not there"
            partial += "#" in name
            blobs.delete(TENANT, name)
        assert not list((tmp_path / "data" / "objects" / TENANT).iterdir())
    assert partial, "no kill hit a write: this shows nothing"


_LIMITED = """
import json, resource, signal, sys
from cloister_server.errors import Unavailable
from cloister_server.settings import Settings
from cloister_server.store.blobs import Blobs
blobs = Blobs.open_at(Settings.model_validate_json(sys.stdin.readline()))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
blobs.put(sys.argv[1], "obj_" + "1" * 32, b"x" * 2**19)
try:
    blobs.put(sys.argv[1], "obj_" + "2" * 32, b"x" * 2**21)
except Unavailable as refusal:
    print(json.dumps([refusal.code, refusal.message]))
"""


def test_a_write_that_does_not_fit_is_storage_full_and_leaves_nothing(tmp_path: Path) -> None:
    settings = in_files(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, TENANT],
        input=settings.dump_with_secrets(),
        capture_output=True,
        text=True,
        check=True,
    )
    code, message = json.loads(done.stdout)
    assert code == "storage_full" and "full" in message and str(tmp_path) not in message
    assert stored(Blobs.open_at(settings)) == {"obj_" + "1" * 32: 2**19}


@pytest.fixture
def small_disk(service: Service) -> Iterator[Path]:
    """A real file system of one megabyte under the service's objects."""
    place = service.settings.data_dir / "objects"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("file systems can be mounted by root alone, in a container that lets it")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_refuses_an_upload_by_name_and_keeps_neither_row_nor_bytes(
    service: Service, small_disk: Path, make_client: Callable[..., Any]
) -> None:
    tenant_id = make_client().tenant_id

    def seal(size: int) -> str:
        content, of = b"x" * size, {"tenant_id": tenant_id, "kind": "initial"}
        return service.write(ALL_TENANTS, lambda session: vault.seal_object(session, service.blobs, content, **of))  # type: ignore[arg-type]  # mypy widens the values to str

    kept = seal(300_000)
    for _ in range(3):
        assert code_of(lambda: seal(2_000_000)) == "storage_full"
    assert [path.name for path in (small_disk / tenant_id).iterdir()] == [kept]
    with asked_reading(service) as session:
        assert {row.id for row in session.query(SealedObject).filter_by(tenant_id=tenant_id)} == {kept}
        opened = vault.open_object(session, service.blobs, tenant_id=tenant_id, object_id=kept)
    assert opened == b"x" * 300_000
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert code_of(lambda: seal(10)) == "storage_unavailable"
    assert code_of(lambda: service.blobs.delete(tenant_id, kept)) == "storage_unavailable"
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert code_of(lambda: service.blobs.get(tenant_id, new_id("obj"))) == "storage_missing"


def test_what_is_synced_in_vain_is_not_left_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may tell only then that it is full."""
    blobs, one = Blobs.open_at(in_files(tmp_path)), new_id("obj")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert code_of(lambda: blobs.put(TENANT, one, b"x")) == "storage_full"
    assert stored(blobs) == {}


def test_a_directory_that_is_none_is_storage_unavailable(tmp_path: Path) -> None:
    blobs = Blobs.open_at(in_files(tmp_path))
    (tmp_path / "data" / "objects" / TENANT).write_text("a file")
    assert code_of(lambda: blobs.put(TENANT, new_id("obj"), b"x")) == "storage_unavailable"
    with pytest.raises(StartRefused, match="cannot be made"):
        Blobs.open_at(Settings(data_dir=tmp_path / "data" / "objects" / TENANT, key_dir=tmp_path / "keystore"))


class FaultyStore(Faulty):
    """The same, asked as S3 is."""

    do_PUT = Faulty.do_GET  # noqa: N815 (the base class calls it so)


STORE_FAULTS: dict[str, Callable[[Faulty], None]] = {
    **FAULTS,
    "403": lambda handler: handler.answer(403, b"<Error><Code>AccessDenied</Code></Error>"),
    "404": lambda handler: handler.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>"),
    "501": lambda handler: handler.answer(501, b"<Error><Code>NotImplemented</Code></Error>"),
}
ANSWERS_OF_200 = {
    "200 with a page", "200 and empty", "no object", "null", "an empty object", "wrong fields", "not UTF-8", "deeply nested",
}  # fmt: skip
"""As an object's bytes any of these will do: that they are not what was sealed is for its key to tell."""


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_a_bucket_that_fails_is_refused_by_name_and_in_time(fault: str, tmp_path: Path) -> None:
    with served(FaultyStore, faults=[STORE_FAULTS[fault]]) as url:
        blobs = Blobs.open_at(in_bucket(url, tmp_path, timeout_s=1 if fault in SLOW else 60))
        one, started = new_id("obj"), time.monotonic()
        assert code_of(lambda: blobs.put(TENANT, one, b"x")) == "storage_unavailable"
        assert code_of(lambda: blobs.delete(TENANT, one)) == "storage_unavailable"
        if fault not in ANSWERS_OF_200:
            is_missing = fault == "404 of wrong types"
            assert code_of(lambda: blobs.get(TENANT, one)) == f"storage_{'missing' if is_missing else 'unavailable'}"
        if fault in SLOW:
            assert time.monotonic() - started < 50, "before it would have answered"


def test_a_bucket_that_is_full_is_storage_full(tmp_path: Path) -> None:
    for status, told in (
        (507, b"<Error><Code>XMinioStorageFull</Code></Error>"),
        (403, b"<Error><Code>QuotaExceeded</Code></Error>"),
    ):
        with served(FaultyStore, faults=[lambda handler, s=status, t=told: handler.answer(s, t)]) as url:
            blobs = Blobs.open_at(in_bucket(url, tmp_path))
            assert code_of(lambda blobs=blobs: blobs.put(TENANT, new_id("obj"), b"x")) == "storage_full"  # type: ignore[misc]  # a bound default


def test_a_bucket_that_is_down_or_not_there_is_storage_unavailable(s3: str, tmp_path: Path) -> None:
    nobody = Blobs.open_at(in_bucket("http://127.0.0.1:9", tmp_path))
    elsewhere = Blobs.open_at(in_bucket(s3, tmp_path).model_copy(update={"blob_url": "s3://no-such-bucket"}))
    for blobs in (nobody, elsewhere):
        for ask in (
            lambda blobs=blobs: blobs.put(TENANT, new_id("obj"), b"x"),
            lambda blobs=blobs: blobs.get(TENANT, new_id("obj")),
            lambda blobs=blobs: blobs.delete(TENANT, new_id("obj")),
            lambda blobs=blobs: list(blobs.pages()),
        ):
            assert code_of(ask) == "storage_unavailable"


def test_the_secret_is_told_to_children_by_pipe_and_to_nobody_else(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = in_bucket(s3, tmp_path)
    blobs = Blobs.open_at(settings)
    for told in (repr(settings), str(settings.model_dump()), repr(blobs), repr(vars(blobs))):
        assert SECRET not in told
    again = Settings.model_validate_json(settings.dump_with_secrets())
    assert again.blob_secret_access_key is not None and again.blob_secret_access_key.get_secret_value() == SECRET
    for name, value in {"BLOB_URL": "s3://bucket/place", "BLOB_SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", value)
    with pytest.raises(StartRefused, match="BLOB_ACCESS_KEY_ID") as refusal:
        Blobs.open_at(load_settings())
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blob_url", "https://bucket.example"),
        ("blob_url", "s3://"),
        ("blob_url", "s3://Bucket"),
        ("blob_url", "s3://bucket/../x?y"),
        ("blob_endpoint", f"https://key:{SECRET}@store.example"),
        ("blob_endpoint", "store.example"),
        ("blob_timeout_s", "0"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(StartRefused, match=f"CLOISTER_{name.upper()}") as refusal:
        load_settings(**{name: value})
    assert SECRET not in str(refusal.value)
