"""Every setting of every process, in one place: the only reader of the environment and of files with secrets.

Settings are built on call (`Settings()`), never at import, so that a process sees the environment that it was started
with and tests can shorten every clock. `docs/operations.md` lists them, and a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from jobs import addresses

MIB = 1024 * 1024
SECRETS_DIR = Path("/run/secrets")
"""Where Docker, Podman and our Kubernetes manifests mount secrets: one file each, named `pagemill_` and the setting."""


class Settings(BaseSettings):
    """Read from `PAGEMILL_*` variables. Durations are seconds, sizes are bytes."""

    # A complaint about one value must not print the others: some are secrets.
    model_config = SettingsConfigDict(
        env_prefix="PAGEMILL_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        env_ignore_empty=True,  # Compose and systemd pass on what is not set as an empty value
    )

    # Where things are
    data_dir: Path = Field(
        default_factory=lambda: Path.home() / ".pagemill",
        description="Embedded services, logs, the key pepper and the first API key.",
    )
    database_url: str | None = Field(
        default=None, description="Postgres, e.g. postgresql://user:password@host/name. Unset: `up` starts one."
    )
    database_password: SecretStr | None = Field(
        default=None,
        description="Password for a `PAGEMILL_DATABASE_URL` that holds none, as it is: not percent-encoded.",
    )
    redis_url: str | None = Field(default=None, description="Redis or Valkey. Unset: `up` starts one.")
    url: str = Field(
        default="http://127.0.0.1:8100", description="Where the command line finds the API when no `up` runs here."
    )

    # The API
    host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    port: int = Field(default=8100, ge=0, le=65535, description="Port that the API listens on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        default=None, description="A first key, created for the tenant `default` by `migrate` and `up`."
    )
    key_pepper: SecretStr | None = Field(
        default=None, description="Secret that API keys are hashed with. Unset: a file in the data directory."
    )
    database_pool_size: int = Field(default=10, ge=1, description="Connections to Postgres in each process' pool.")
    api_database_timeout: float = Field(
        default=10.0,
        gt=0,
        description="A query of the API may take this long; a silent Postgres is given up soon after.",
    )
    max_body_bytes: int = Field(default=8192 * MIB, ge=1024, description="Largest NDJSON submission.")
    max_inline_bytes: int = Field(default=32 * MIB, ge=1024, description="Largest JSON body of any other request.")
    max_line_bytes: int = Field(default=4 * MIB, ge=64, description="Longest line of an NDJSON submission.")
    max_lines: int = Field(default=5_000_000, ge=1, description="Most prompts in one job.")
    max_json_depth: int = Field(default=64, ge=4, description="Deepest nesting of any JSON document.")
    head_timeout: float = Field(default=10.0, gt=0, description="A request's head that takes longer is cut.")
    body_timeout: float = Field(
        default=60.0, gt=0, description="A client that sends no body, or takes no answer, for this long is cut."
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="Connections to one API process. Unset: what its file descriptors allow, less 64.",
    )
    stage_chunk_lines: int = Field(default=500, ge=1, description="Lines written to Postgres in one transaction.")
    max_priority: int = Field(
        default=100,
        ge=-100,
        le=100,
        description="Highest `priority` that a job may have; it orders a tenant's own jobs.",
    )
    max_wait: float = Field(default=60.0, gt=0, description="Longest `?wait=` of a long poll.")
    max_live_requests: int = Field(
        default=1000, ge=1, description="Live requests of an API process that wait for their answers at once."
    )

    # Files
    files_url: str | None = Field(
        default=None,
        description="Where files' contents lie: file:///a/directory or s3://bucket/prefix. Unset: `files` in the data "
        "directory.",
    )
    max_file_bytes: int = Field(default=8192 * MIB, ge=1024, description="Largest file.")
    max_part_bytes: int = Field(default=64 * MIB, ge=1024, description="Largest part of an upload.")
    max_tenant_file_bytes: int = Field(
        default=65536 * MIB, ge=1024, description="What all files of a tenant may take, unfinished uploads included."
    )
    upload_expiry: float = Field(
        default=3600.0, gt=0, description="An upload that is not complete after this long expires."
    )

    # Models
    model: str | None = Field(
        default=None,
        description="Model that `up` and `worker` serve when none is named; one worker serves several, with commas, in "
        "turn.",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda.")
    dtype: str = Field(default="auto", description="auto, float32 or bfloat16.")
    kv_cache_dtype: str = Field(
        default="auto", description="auto, or float8_e4m3: keys and values in a byte each, on a GPU."
    )
    quantization: str | None = Field(default=None, description="int8 rounds the weights of linear layers, on a CPU.")
    deterministic: bool = Field(
        default=False, description="The same bits for a request in any batch, on a CPU, at the price of speed."
    )
    max_model_len: int | None = Field(default=None, ge=1, description="Context, if shorter than the model's own.")
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="Requests that run in one step at most. Unset: 256, more on a large GPU."
    )
    max_num_batched_tokens: int | None = Field(
        default=None, ge=16, description="Tokens in one step at most. Unset: 2,048, more on a large GPU."
    )
    block_size: int | None = Field(
        default=None, ge=1, description="Positions in a block of the KV cache. Unset: 16, and 64 on a GPU."
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory for keys and values on a CPU, taken at the start. Unset: up to half of what is free.",
    )
    weight_cache_bytes: int = Field(
        default=16384 * MIB,
        ge=0,
        description="What packed weights may take on disk, where a worker's next start on a CPU maps them. 0: none are "
        "kept.",
    )
    weight_cache_dir: Path | None = Field(
        default=None, description="Where packed weights lie. Unset: `~/.cache/pagemill/weights`."
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory to use.")
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="Processes that share the model, each with a GPU of its own, or on a CPU."
    )
    model_switch_after: float = Field(
        default=60.0,
        ge=0,
        description="A worker of several models leaves one for which lines wait when those of another have waited this "
        "long, or ten times what the switch costs.",
    )
    kept_model_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Main memory that models may keep which a worker on a CPU does not run now. Unset: what is free "
        "beside the one that it runs.",
    )
    share_prefixes: bool = Field(
        default=False, description="Let tenants hit each other's cached prefixes (observable by timing)."
    )

    # Workers
    poll_interval: float = Field(default=1.0, gt=0, description="A claim is tried at least this often.")
    heartbeat_interval: float = Field(default=5.0, gt=0, description="A worker renews its lease this often.")
    lease: float = Field(default=30.0, gt=0, description="A worker silent for longer is dead, its requests are freed.")
    fence_after: float = Field(
        default=20.0, gt=0, description="A worker writes nothing later than this after its last good heartbeat began."
    )
    write_interval: float = Field(default=0.2, gt=0, description="Finished requests wait so long for others that run.")
    line_timing: bool = Field(default=True, description="Keep where each line's time went, some 10 bytes a line.")
    claim_limit: int = Field(default=512, ge=1, description="Requests in one claim at most.")
    claim_bytes: int = Field(default=64 * MIB, ge=1, description="A claim ends with the prompt that reaches this size.")
    drain_deadline: float = Field(
        default=20.0, ge=0, description="After SIGTERM running requests may finish for this long, then are given back."
    )
    watchdog: float = Field(default=60.0, gt=0, description="An engine without a step for this long ends its process.")
    max_deaths: int = Field(
        default=3, ge=1, description="A request that was running in this many deaths of a worker is given up."
    )
    solo_after_deaths: int = Field(
        default=2, ge=1, description="A request that was running in this many deaths of a worker runs alone next."
    )

    # The courier
    sweep_interval: float = Field(
        default=5.0, gt=0, description="Dead leases, expiry and lost notifications are looked for."
    )
    sweep_chunk: int = Field(default=2000, ge=1, description="Requests ended in one transaction by a sweep.")
    staging_timeout: float = Field(
        default=900.0, gt=0, description="A submission that stored nothing for this long is collected."
    )
    stalled_after: float = Field(
        default=300.0, gt=0, description="A job of which no line runs or ends for this long is announced as stalled."
    )
    open_job_expiry: float = Field(
        default=86400.0, gt=0, description="An open job to which nothing was appended for this long is collected."
    )
    retention: float = Field(default=30 * 86400.0, gt=0, description="Ended jobs are deleted after this long.")
    audit_retention: float = Field(
        default=90 * 86400.0, gt=0, description="Entries of the audit log are deleted after this long."
    )
    webhook_poll_interval: float = Field(default=1.0, gt=0, description="Due webhook deliveries are looked for.")
    webhook_timeout: float = Field(default=15.0, gt=0, description="One delivery may take this long in all.")
    webhook_concurrency: int = Field(default=16, ge=1, description="Deliveries under way at once.")
    webhook_allow_private: bool = Field(default=False, description="Allow webhooks to private and loopback addresses.")
    webhook_schedule: tuple[float, ...] = Field(
        default=(0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
        description="Seconds to wait before each delivery attempt (a JSON list).",
    )

    # Redis
    redis_timeout: float = Field(default=1.5, gt=0, description="Connecting to or asking Redis may take this long.")

    # Metrics
    metrics_host: str = Field(
        default="127.0.0.1", description="Address that a worker's and a courier's metrics listen on."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of a worker's or courier's `/metrics`, `/healthz`, `/readyz`; 0 takes a free one. Unset: "
        "none. `up` counts on from it: the courier's, then one for each worker.",
    )

    metrics_token: SecretStr | None = Field(
        default=None, description="Bearer token for the API's `/metrics`, which is closed without one."
    )

    # Logs
    log_level: str = Field(
        default="info", pattern="(?i)^(debug|info|warning|error)$", description="debug, info, warning or error."
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="text, or json: one object a line, with the ids of request, job, batch, event or worker.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments before the environment before files: `PAGEMILL_API_KEY`, then `/run/secrets/pagemill_api_key`."""
        if not SECRETS_DIR.is_dir():
            return init_settings, env_settings
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, secrets_dir=SECRETS_DIR)

    @model_validator(mode="before")
    @classmethod
    def _url_with_its_password(cls, values: dict[str, Any]) -> dict[str, Any]:
        url, password = values.get("database_url"), values.get("database_password")
        if not isinstance(url, str) or not password:
            return values
        if isinstance(password, SecretStr):
            password = password.get_secret_value()
        return values | {"database_url": addresses.with_password(url, str(password))}

    @field_validator("data_dir", "weight_cache_dir")
    @classmethod
    def _home_is_meant(cls, path: Path | None) -> Path | None:
        # A shell does not expand the tilde of a value in quotes, nor of one in an env file.
        return None if path is None else path.expanduser()

    @field_validator("database_url")
    @classmethod
    def _leads_to_postgres(cls, url: str | None) -> str | None:
        return url if url is None else addresses.postgres(url)

    @field_validator("redis_url")
    @classmethod
    def _leads_to_redis(cls, url: str | None) -> str | None:
        return url if url is None else addresses.redis(url)

    @field_validator("url")
    @classmethod
    def _leads_to_an_api(cls, url: str) -> str:
        return addresses.http(url)

    @model_validator(mode="after")
    def _clocks_in_proportion(self) -> Settings:
        # Otherwise healthy workers are taken for dead, or write what others were given.
        if not self.heartbeat_interval < self.fence_after < self.lease:
            raise ValueError(
                f"PAGEMILL_HEARTBEAT_INTERVAL ({self.heartbeat_interval:g}) < PAGEMILL_FENCE_AFTER "
                f"({self.fence_after:g}) < PAGEMILL_LEASE ({self.lease:g}) is needed"
            )
        return self
