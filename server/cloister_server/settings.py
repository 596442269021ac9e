"""The one frozen settings object, read once from the environment; nothing else reads `os.environ`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from cloister_server.errors import StartRefused

__all__ = [
    "RoleSettings",
    "Settings",
    "child_environment",
    "load_role_settings",
    "load_settings",
    "names_deployment",
    "profile_asked_for",
    "profile_directory",
]

S = TypeVar("S", bound=BaseModel)


def _home(kind: Literal["data", "config"]) -> Path:
    """The XDG base directory of the user (freedesktop.org base directory specification)."""
    default = {"data": ".local/share", "config": ".config"}[kind]
    return Path(os.environ.get(f"XDG_{kind.upper()}_HOME") or Path.home() / default) / "cloister"


class Settings(BaseModel):
    """Every knob of a deployment; `CLOISTER_<NAME>` in the environment sets `<name>`.

    Keys live outside the data directory by default, so that a copy of the data is not a copy of the keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(default_factory=lambda: _home("data"))
    key_dir: Path = Field(default_factory=lambda: _home("config") / "keystore")
    key_file: Path | None = None
    """A root key file for unattended starts, mode 0600; without one the passphrase is asked for."""
    key_providers: Path | None = None
    """A file, mode 0600, that names other key providers: an HSM, a KMS, a tenant's own (docs/keys.md)."""
    key_cache_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """How long an opened model is served after its tenant's key was last to be had, and the service's own keys are remembered."""
    model_cache_bytes: Annotated[int, Field(ge=2**26)] = 4 * 2**30
    """The most memory that the opened models of an API process take; those asked for least recently make room."""
    strict: bool = False
    """Whether a model's bytes are held against its signed certificate every time they are opened."""
    database_url: SecretStr = SecretStr("")
    """The runtime role's URL; SQLite in the data directory where it is empty."""
    owner_database_url: SecretStr | None = None
    """The owner's URL, for `cloister-admin init` only (PostgreSQL)."""
    blob_url: Annotated[
        str, Field(pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9/_.-]*)?)?$")
    ] = ""
    """Where the sealed objects lie: `s3://BUCKET/PREFIX`; in `objects` in the data directory where it is empty."""
    blob_endpoint: Annotated[str, Field(pattern=r"^(https?://[^\s/@?#]+/?)?$")] = ""
    """Of a store that speaks S3 and is not AWS's."""
    blob_region: str = ""
    blob_access_key_id: str = ""
    """With the secret; where both are empty the machine's own role is asked for, as AWS's tools do it."""
    blob_secret_access_key: SecretStr | None = None
    blob_timeout_s: Annotated[int, Field(ge=1, le=600)] = 30
    """The most that one request to the bucket may take, and that retries of it may begin after."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8443
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of the proxies in front, separated by commas: of theirs the last X-Forwarded-For is believed."""
    issuer: str = ""
    """The public base URL, and the `iss` of every token; by default http://host:port."""
    http_server: Literal["granian", "uvicorn"] = "granian"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs_at_once: Annotated[int, Field(ge=1, le=64)] = 1
    chunk_steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Steps written ahead in the ledger at a time, or a 200th of the job's where that is more: the most a crash can waste."""
    token_lifetime_s: Annotated[int, Field(ge=30, le=600)] = 600
    max_body_bytes: Annotated[int, Field(ge=2**20, le=2**30)] = 64 * 2**20
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fill_derived(self) -> Settings:
        values = self.__dict__
        values["data_dir"], values["key_dir"] = self.data_dir.absolute(), self.key_dir.absolute()
        if not self.database_url.get_secret_value():
            values["database_url"] = SecretStr(f"sqlite:///{self.data_dir}/cloister.db")
        if not self.issuer:
            values["issuer"] = f"http://{self.host}:{self.port}"
        return self

    @property
    def is_sqlite(self) -> bool:
        return self.database_url.get_secret_value().startswith("sqlite")

    @property
    def anchor_dir(self) -> Path:
        """Where the ledgers are anchored: with the keys, and so neither in the database nor in its backups."""
        return self.key_dir / "anchors"

    @property
    def key_record_dir(self) -> Path:
        """Where every key is on record, beside the anchors."""
        return self.anchor_dir / "keys"

    @property
    def workflow_database_url(self) -> str:
        """Where the durable queue keeps its state: a file of its own beside SQLite, the same database on PostgreSQL."""
        if self.is_sqlite:
            return f"sqlite:///{self.data_dir}/workflows.db"
        return self.database_url.get_secret_value()

    def dump_with_secrets(self) -> str:
        """As JSON with its secrets, for a child's pipe and nowhere else."""
        values = self.model_dump(mode="json")
        values["database_url"] = self.database_url.get_secret_value()
        if self.blob_secret_access_key is not None:
            values["blob_secret_access_key"] = self.blob_secret_access_key.get_secret_value()
        if self.owner_database_url is not None:
            values["owner_database_url"] = None  # no child migrates
        return json.dumps(values)


class RoleSettings(BaseModel):
    """Every knob of a party or a dealer of private inference; `CLOISTER_ROLE_<NAME>` in the environment sets `<name>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path = Field(default_factory=lambda: _home("data").with_name("cloister-role"))
    """Its identity, which indices it has burned and, sealed, randomness for later. One role's alone, and never a restored copy."""
    file: Path
    """The role file, sealed for it, of the deployment that it serves."""
    certificate_keys: Path
    """The platform's certificate keys, got by another way than the role file."""
    listen: str | None = None
    """The address to listen at; by default the host that its record names."""
    form_s: Annotated[float, Field(ge=1, le=60)] = 10.0
    """The most that forming the group may take, before it is tried anew."""
    request_s: Annotated[float, Field(ge=1, le=600)] = 30.0
    disk_bytes: Annotated[int, Field(ge=2**20)] = 2**28
    """The most that randomness for later may take on disk at party 0."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load_settings(**given: Any) -> Settings:
    """Read `CLOISTER_*`, what is given going before it; an impossible value refuses the start by name."""
    return _load(Settings, "CLOISTER_", given)


def load_role_settings(**given: Any) -> RoleSettings:
    """Read `CLOISTER_ROLE_*`, as `load_settings` reads the server's."""
    return _load(RoleSettings, "CLOISTER_ROLE_", given)


def _load(model: type[S], prefix: str, given: dict[str, Any]) -> S:
    read = {name: os.environ.get(f"{prefix}{name.upper()}") for name in model.model_fields}
    try:
        return model.model_validate({**{name: value for name, value in read.items() if value}, **given})
    except ValidationError as error:
        problems = "; ".join(f"{prefix}{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise StartRefused(f"the settings do not hold: {problems}; correct the environment") from None


def profile_directory() -> Path:
    """Where operators' logins at deployments elsewhere are kept."""
    return _home("config") / "operators"


def profile_asked_for() -> str | None:
    """Which of them the environment means."""
    return os.environ.get("CLOISTER_PROFILE") or None


def names_deployment() -> bool:
    """Whether the environment says where a deployment of this machine has its data, keys or database."""
    return any(os.environ.get(f"CLOISTER_{name}") for name in ("DATA_DIR", "KEY_DIR", "KEY_FILE", "DATABASE_URL"))


def child_environment(**more: str) -> dict[str, str]:
    """What a child process inherits: the environment without ours in it, since settings and secrets come by pipe."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}, **more}
