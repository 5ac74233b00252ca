"""All settings: each with its unit, its bounds and what it trades.

A flag `--request-timeout-s` and the environment variable `EMBEDSTREAM_REQUEST_TIMEOUT_S` are the same setting. One
frozen `Settings` is built where a process starts and passed down. Names taken from text-embeddings-inference keep
its spelling; all others end in their unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .urls import REDIS_SCHEMES

PREFIX = "EMBEDSTREAM_"
AUTO = "auto"
"""What people write for "as the machine allows"."""

_MIB = 1024 * 1024


class Role(StrEnum):
    """The commands that read a setting."""

    SERVE = "serve"
    API = "api"
    CONSUMER = "consumer"
    EMBED = "embed"
    DEAD_LETTERS = "dead-letters"
    DOCTOR = "doctor"
    FETCH = "fetch"
    BACKFILL = "backfill"
    JOBS = "jobs"


class Dtype(StrEnum):
    """Number format of the model's weights and of the forward pass."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Float32Precision(StrEnum):
    """How exactly numbers in float32 are multiplied."""

    IEEE = "ieee"
    TF32 = "tf32"


class PoolingName(StrEnum):
    """How the hidden states of a sequence become its vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"
    ALL = "all"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    WEIGHTED_MEAN = "weighted_mean"


class LongInputsName(StrEnum):
    """What becomes of inputs longer than the model reads, when a request does not say."""

    ERROR = "error"
    TRUNCATE = "truncate"
    CHUNK = "chunk"


class TokenIds(StrEnum):
    """Whose token ids HTTP clients send."""

    MODEL = "model"
    CL100K = "cl100k"


class LogLevel(StrEnum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """Form of the log lines on stderr."""

    CONSOLE = "console"
    JSON = "json"


def _setting(default: Any, description: str, *roles: Role, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"roles": [*roles]}, **bounds)


_ALL = (Role.SERVE, Role.API, Role.CONSUMER, Role.EMBED, Role.DEAD_LETTERS, Role.BACKFILL)
_SERVERS = (Role.SERVE, Role.API, Role.CONSUMER)
_HTTP = (Role.SERVE, Role.API)
_DEVICE = (Role.SERVE, Role.CONSUMER)
_MODEL = (Role.SERVE, Role.CONSUMER, Role.DOCTOR, Role.BACKFILL)
"""Of what decides the vectors, or how fast they come; a backfill without any server brings consumers of its own."""
_CALLERS = (Role.SERVE, Role.API, Role.EMBED, Role.BACKFILL)

Names = Annotated[tuple[str, ...], NoDecode]
"""Several values; in the environment they are separated by commas."""


class Settings(BaseSettings):
    """What an operator can set. Flags win over the environment, the environment over the defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", populate_by_name=True)

    # Where it listens and what it connects to
    host: str = _setting("127.0.0.1", "Address the HTTP server binds.", *_HTTP)
    port: int = _setting(8000, "Port the HTTP server binds; 0 takes a free one.", *_HTTP, ge=0, le=65535)
    redis_url: str | None = _setting(
        None,
        "Redis or Valkey: redis://, rediss:// or unix://. Default: that of the `serve` that runs on this machine; for "
        "`serve` itself, and for a backfill that finds none, an embedded Valkey.",
        *_ALL,
        Role.JOBS,
    )
    key_prefix: str = _setting(
        "ek",
        "Beginning of all Redis keys; separates deployments in one database.",
        *_ALL,
        Role.JOBS,
        pattern=r"^[\w.-]{1,64}$",
    )
    data_dir: Path | None = _setting(
        None, "Folder for the embedded Valkey's append-only file; without it the queue lives in memory.", Role.SERVE
    )
    embedded_maxmemory_bytes: int = _setting(
        0,
        "Memory limit of the embedded Valkey; 0 is a quarter of the machine's memory, at most 2 GiB.",
        Role.SERVE,
        Role.BACKFILL,
        ge=0,
    )
    api_key: Names = _setting(
        (), "Key that HTTP clients must send as a bearer token; repeat for several. None: open.", *_HTTP
    )
    api_keys_file: Path | None = _setting(
        None,
        "A TOML file of named keys, each with a lane and a quota if you like; read again when it changes. See "
        "docs/keys.md.",
        *_HTTP,
    )
    cors_allow_origin: Names = _setting(
        (),
        "Web pages that may call the API from a browser, such as `https://app.example`; repeat for several, `*` for "
        "all. None: browsers allow no page of another site.",
        *_HTTP,
    )

    # The model
    model: str = _setting(
        "all-MiniLM-L6-v2",
        "A directory, a Hugging Face Hub id, or the short name of an installed weights package.",
        *_ALL,
        Role.DOCTOR,
    )
    served_model_name: Names = _setting(
        (),
        "Name clients use; repeat for several, the first is shown. Default: the last part of the model's id or path.",
        *_ALL,
    )
    revision: str | None = _setting(None, "Branch, tag or commit of a Hub model.", *_MODEL, Role.FETCH)
    pooling: PoolingName | None = _setting(
        None, "Override the pooling of the model's files; `all` serves one vector for each token.", *_MODEL
    )
    strict_recipe: bool = _setting(
        False,
        "Refuse a model whose files do not say how it is pooled, unless `--pooling` does. Else it is pooled as its "
        "architecture usually is, with a warning.",
        *_MODEL,
    )
    normalize: bool | None = _setting(
        None,
        "Override whether vectors are scaled to unit length when a request does not say.",
        Role.SERVE,
        Role.CONSUMER,
        Role.DOCTOR,
    )
    default_prompt_name: str | None = _setting(
        None,
        "Override which of the model's prompts is put before texts that come without a choice; empty for none.",
        *_MODEL,
    )
    default_task: str | None = _setting(
        None,
        "Adapter of the model, by the task's name, for requests that choose none. Default: none, the bare model.",
        *_MODEL,
    )
    max_model_len: int | None = _setting(
        None, "Longest input in tokens; it may only lower the model's own limit.", *_MODEL, ge=1
    )
    matryoshka_dims: str | None = _setting(
        None,
        "Vector sizes clients may ask for: `any`, `off`, or a list such as `64,128,256`. Default: the model's files.",
        *_MODEL,
    )
    chat_template: Path | None = _setting(
        None, "File with a Jinja template for chat messages, in place of the model's own.", *_MODEL
    )
    dtype: Dtype = _setting(
        Dtype.AUTO,
        "Number format of the forward pass. `auto`: bfloat16 on CPUs on which it is faster (AMX, AVX512-BF16, Arm "
        "BF16), float16 on CUDA, or bfloat16 for Gemma and models made in it, each checked at start against float32; "
        "else float32. Vectors of two formats differ a little: make an index and its queries with the same one.",
        *_MODEL,
    )
    dtype_check_limit_bytes: int = _setting(
        4096 * _MIB,
        "Largest model, by its weights in float32, that is loaded in float32 at its first start to check the vectors "
        "it has in a half format; larger ones are not checked. It costs the time and, before the model is loaded, the "
        "memory of that. 0 checks none.",
        *_MODEL,
        ge=0,
    )
    float32_precision: Float32Precision = _setting(
        Float32Precision.IEEE,
        "How float32 is multiplied: `ieee` as it is, `tf32` with factors rounded to 10 bits on CUDA, which is faster "
        "and changes vectors about as much as float16 does.",
        *_MODEL,
    )

    # Processes and the device
    api_workers: int = _setting(1, "API processes that `serve` starts.", Role.SERVE, ge=1, le=256)
    consumers: int | None = _setting(
        None,
        "Consumer processes that `serve` starts, or a backfill that finds no server. Default, or `auto`: one for each "
        "NVIDIA GPU that `CUDA_VISIBLE_DEVICES` shows, and one where there is none. A number of them goes round the "
        "GPUs, unless `--device` names one.",
        Role.SERVE,
        Role.BACKFILL,
        ge=0,
        le=256,
    )
    device: str | None = _setting(
        None, "Torch device, such as `cpu` or `cuda:1`. Default: CUDA where there is one, else the CPU.", *_MODEL
    )
    threads: int = _setting(
        0,
        "CPU threads of one forward pass. 0 takes what `OMP_NUM_THREADS` says, else the consumer's share of the cores.",
        *_MODEL,
        ge=0,
    )
    keep_memory_bytes: int = _setting(
        1024 * _MIB,
        "Most freed memory that a consumer keeps for its next batch; less makes batches slower by the time the system "
        "takes to hand it out anew. 0 leaves that to the C library, and so do variables `MALLOC_*`, and "
        "`GLIBC_TUNABLES` of `glibc.malloc`.",
        *_MODEL,
        ge=0,
        le=2**31 - 1,
    )
    compile: bool = _setting(
        False,
        "Compile layers with torch.compile before serving, and use what is faster that way; of models built like BERT. "
        "Takes half a minute at the first start, and is kept on disk for the next ones. Needs a C++ compiler.",
        *_MODEL,
    )
    compile_cache_dir: Path | None = _setting(
        None, "Where compiled code is kept. Default: embedstream/compiled in the user's cache folder.", *_MODEL
    )
    graph_tokens: int = _setting(
        512,
        "On CUDA, batches of up to so many tokens are launched as one graph, which saves the time of some hundred "
        "single launches; it is captured at the start for sizes from 16 tokens on, each twice the one before. 0: none.",
        *_MODEL,
        ge=0,
        le=16_384,
    )
    graph_memory_bytes: int = _setting(
        512 * _MIB,
        "Most memory of a CUDA device that graphs may take; sizes that would need more are launched kernel by kernel.",
        *_MODEL,
        ge=0,
    )
    batch_tokens: int = _setting(
        0,
        "Token budget of a micro-batch, with padding where there is some, and with what attention takes of long texts. "
        "More fills a GPU, less answers sooner. 0 finds it by measuring when the model is loaded.",
        *_MODEL,
        ge=0,
    )
    measure_ms: int = _setting(
        2000,
        "Most time for finding the token budget. 0 takes 4,096 on a CPU and 65,536 on a GPU, and times no kernels.",
        *_MODEL,
        ge=0,
        le=600_000,
    )
    batch_latency_ms: int = _setting(
        1000,
        "Longest time of a full batch, for a token budget that is found: what the first interactive request may wait "
        "for the batch before its own; on a GPU there may be two.",
        *_MODEL,
        ge=1,
        le=600_000,
    )
    memory_share_percent: int = _setting(
        80,
        "Most of the free memory that a batch may take, of a GPU or of the container or machine, for a token budget "
        "that is found.",
        *_MODEL,
        ge=1,
        le=95,
    )
    keep_measurements: bool = _setting(
        True,
        "Keep on disk what is measured when a model is loaded, such as the token budget, and believe it at the next "
        "start with the same weights, device and versions.",
        *_MODEL,
    )
    measured_dir: Path | None = _setting(
        None, "Where measurements are kept. Default: embedstream/measured in the user's cache folder.", *_MODEL
    )
    packed_weights_limit_bytes: int = _setting(
        1024 * _MIB,
        "Most memory of a consumer on a CPU for a second copy of the model's weights, in the layout that its "
        "matrix products read fastest; layers beyond it do without. None is made where it does not pay.",
        *_MODEL,
        ge=0,
    )
    heartbeat_interval_ms: int = _setting(500, "Time between two heartbeats of a consumer.", *_DEVICE, ge=50, le=60_000)
    heartbeat_ttl_ms: int = _setting(
        3000, "A consumer silent for this long counts as dead.", *_DEVICE, ge=200, le=600_000
    )
    lease_check_ms: int = _setting(
        500,
        "Time between two looks for work of dead consumers and for entries of our own that a lost reply left behind.",
        *_DEVICE,
        ge=50,
        le=60_000,
    )
    lease_backstop_s: int = _setting(
        300,
        "An entry in one consumer's hands for this long is taken by another. Only for defects: it must exceed the "
        "longest wait and batch there can be.",
        *_DEVICE,
        ge=10,
        le=86_400,
    )
    watchdog_s: float = _setting(
        10.0,
        "A batch that runs longer than this, and longer than five times its prediction, counts as hung: the consumer "
        "gives its work back, and ends itself when the batch stays for as long again.",
        *_DEVICE,
        gt=0,
        le=86_400,
    )
    max_consumer_deaths: int = _setting(
        4,
        "Consumers that may die with a job on their device before it becomes a dead letter: the first in an ordinary "
        "batch, the second in a small group, the others alone.",
        *_DEVICE,
        ge=2,
        le=100,
    )
    dead_letter_limit: int = _setting(
        100_000, "Most dead letters kept for a model; the oldest go first.", *_DEVICE, ge=1
    )
    dead_letter_ttl_s: int = _setting(
        7 * 86_400, "Dead letters older than this are dropped when a new one comes.", *_DEVICE, ge=60
    )
    latency_slice_ms: int = _setting(
        50,
        "Longest predicted time of a bulk batch while interactive requests are about: what one of them waits at most "
        "for bulk work.",
        *_DEVICE,
        ge=1,
        le=60_000,
    )
    bulk_share_percent: int = _setting(
        10,
        "Part of the device's tokens and time that bulk gets however much interactive work waits; callers predict "
        "waits by it.",
        *_CALLERS,
        Role.CONSUMER,
        ge=1,
        le=90,
    )
    metrics_port: int | None = _setting(
        None,
        "Port on which a consumer answers `GET /metrics`; 0 takes a free one. Default: none, for `serve` shows all of "
        "its processes at the API's `/metrics`.",
        Role.CONSUMER,
        ge=0,
        le=65535,
    )
    metrics_host: str = _setting("127.0.0.1", "Address of a consumer's metrics port.", Role.CONSUMER)
    shutdown_timeout_s: float = _setting(
        30.0, "Time a process has to finish its work after SIGTERM before it is ended.", *_SERVERS, Role.BACKFILL, gt=0
    )

    # Requests
    request_timeout_s: float = _setting(
        60.0, "Deadline of a request; past it the answer is a 504.", *_CALLERS, gt=0, le=86_400
    )
    payload_limit: int = _setting(64 * _MIB, "Largest HTTP body in bytes.", *_HTTP, ge=1024)
    bodies_limit_bytes: int = _setting(
        1024 * _MIB,
        "Most bytes of HTTP bodies, inflated, that one API process holds at a time; beyond it the answer is a 503. One "
        "alone is always taken.",
        *_HTTP,
        ge=_MIB,
    )
    header_limit_bytes: int = _setting(
        64 * 1024,
        "Largest head of an HTTP request, request line and headers, each header counted with 32 bytes more than it "
        "has.",
        *_HTTP,
        ge=1024,
        le=16 * _MIB,
    )
    header_timeout_s: float = _setting(
        20.0,
        "Time a client has to send the head of a request, from its first byte; also for a new connection to send it.",
        *_HTTP,
        gt=0,
        le=86_400,
    )
    read_timeout_s: float = _setting(
        30.0, "A client that sends no byte of its body for this long is answered 408.", *_HTTP, gt=0, le=86_400
    )
    write_timeout_s: float = _setting(
        60.0, "A client that takes no byte of its answer for this long is cut off.", *_HTTP, gt=0, le=86_400
    )
    min_rate_bytes_per_s: int = _setting(
        500,
        "Fewest bytes a second that a client must send of a body, or take of an answer, beyond the read and the write "
        "timeout: else one byte a minute would hold a connection for ever. 0: no such limit.",
        *_HTTP,
        ge=0,
    )
    keep_alive_timeout_s: int = _setting(
        75,
        "Time an idle connection is kept for the next request; longer than load balancers keep theirs (60 s), or they "
        "would meet a closed one.",
        *_HTTP,
        ge=1,
        le=86_400,
    )
    max_connections: int = _setting(
        4096,
        "Most connections of one API process; the next ones are answered 503 and closed, but for probes.",
        *_HTTP,
        ge=1,
    )
    max_body_values: int = _setting(
        400_000,
        "Most values in the JSON of one HTTP body, a list or an object among others counting as two; reading more of "
        "them would hold other requests up.",
        *_HTTP,
        ge=1000,
    )
    metadata_limit_bytes: int = _setting(
        60 * 1024,
        "Largest `metadata` header of the `bytes` format; many HTTP clients stop at 64 KiB or earlier.",
        *_HTTP,
        ge=1024,
    )
    max_request_inputs: int = _setting(2048, "Most inputs in one HTTP request.", *_HTTP, ge=1)
    max_request_tokens: int = _setting(300_000, "Most tokens in one HTTP request.", *_HTTP, ge=1)
    long_inputs: LongInputsName = _setting(
        LongInputsName.ERROR,
        "What becomes of inputs longer than the model reads when a request does not say: `error` refuses them, "
        "`truncate` cuts them, `chunk` embeds them piece by piece and gives the mean.",
        *_CALLERS,
    )
    auto_truncate: bool = _setting(False, "The same as `--long-inputs truncate`.", *_HTTP)
    token_ids: TokenIds = _setting(
        TokenIds.MODEL,
        "Whose token ids clients send: the model's own, or those of OpenAI's cl100k_base, as LangChain does by "
        "default: they are turned back into texts and tokenised anew.",
        *_HTTP,
    )
    cl100k_vocabulary: Path | None = _setting(
        None,
        "File `cl100k_base.tiktoken` for `--token-ids cl100k`. Default: tiktoken's cache, or an installed package that "
        "brings the file; it is never downloaded.",
        *_HTTP,
    )
    trust_request_chat_template: bool = _setting(
        False, "Let requests bring a chat template of their own; it is a program that runs on this server.", *_HTTP
    )
    max_chat_chars: int = _setting(
        4_000_000, "Most characters of text that the chat messages of one HTTP request may become.", *_HTTP, ge=1
    )
    chat_timeout_s: float = _setting(
        5.0, "Longest time for making text of the chat messages of one HTTP request.", *_HTTP, gt=0, le=3600
    )
    max_wait_s: float = _setting(
        10.0,
        "Longest predicted wait that is accepted; beyond it, or beyond 80 % of the request's own deadline, the answer "
        "is a 429.",
        *_CALLERS,
        gt=0,
    )
    scale_from_zero_s: float = _setting(
        0.0,
        "How long a request waits on the queue for the first consumer when none is alive, so that an autoscaler sees "
        "it; 0 refuses it with a 503.",
        *_CALLERS,
        ge=0,
    )
    max_lane_bytes: int = _setting(
        0,
        "Most bytes of jobs on one lane, waiting or running; beyond it requests are refused with 429. 0 takes 20 % "
        "(interactive) or 30 % (bulk) of the server's maxmemory, or 256 MiB where it has none.",
        *_CALLERS,
        ge=0,
    )
    max_undelivered_bytes: int = _setting(
        256 * _MIB,
        "Most bytes of results that one process may have asked for and not yet read; beyond it requests are refused "
        "with 429. Bounds Redis memory when a reader stalls.",
        *_CALLERS,
        ge=_MIB,
    )
    result_ttl_s: int = _setting(
        3600, "How long the result of a submitted request can be picked up by its id.", *_CALLERS, ge=1, le=2**31
    )
    reply_ttl_s: int = _setting(60, "A reply stream whose reader is gone is dropped after this time.", *_CALLERS, ge=5)
    reconcile_after_s: float = _setting(
        3.0, "Age at which a request without a result is looked for in Redis, and sent again if lost.", *_CALLERS, gt=0
    )
    card_cache_dir: Path | None = _setting(
        None, "Where model cards are kept on disk. Default: embedstream/cards in the user's cache folder.", *_CALLERS
    )

    key_labels: int = _setting(
        200, "Most names of API keys that metrics tell apart; the rest are counted together as `other`.", *_HTTP, ge=0
    )
    metrics_open: bool = _setting(False, "Answer `GET /metrics` without a key even when `--api-key` is set.", *_HTTP)

    # Backfills
    part_rows: int = _setting(
        0,
        "Rows of the input that are written and committed together: what a kill costs at most, and what each output "
        "file holds. 0 is 16,384, or fewer where their vectors would take more than 64 MiB.",
        Role.BACKFILL,
        ge=0,
        le=10_000_000,
    )
    window_bytes: int = _setting(
        32 * _MIB,
        "Bytes of texts and columns that are read, embedded and written together: four such windows are in memory. "
        "Equal texts are computed once within one.",
        Role.BACKFILL,
        ge=_MIB,
    )
    credit_s: float = _setting(
        2.0,
        "How long an answer of the queue is to take; the backfill has as much under way. More rides out pauses of the "
        "fleet, less makes way sooner for interactive requests.",
        Role.BACKFILL,
        gt=0,
        le=600,
    )
    patience_s: float = _setting(
        600.0,
        "How long to wait for a consumer, or for Redis, before giving up; what is committed by then stays.",
        Role.BACKFILL,
        ge=0,
        le=86_400 * 7,
    )
    tokenizer_processes: int = _setting(
        0, "Processes that tokenise; 0 takes half of the cores.", Role.BACKFILL, ge=0, le=256
    )

    # Logs
    log_level: LogLevel = _setting(LogLevel.INFO, "The least that is logged.", *_SERVERS)
    log_format: LogFormat = _setting(LogFormat.CONSOLE, "Log lines for people, or one JSON object a line.", *_SERVERS)

    @field_validator("api_key", "cors_allow_origin", "served_model_name", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("consumers", mode="before")
    @classmethod
    def _auto_is_the_default(cls, value: object) -> object:
        return None if value == AUTO else value

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(REDIS_SCHEMES):
            raise ValueError("not a redis://, rediss:// or unix:// URL")
        return value

    @field_validator("cors_allow_origin")
    @classmethod
    def _known_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z\d+.-]*://[^/\s]+", origin):
                raise ValueError("neither `*` nor a scheme and host in lower case such as `https://app.example`")
        return value

    @field_validator("matryoshka_dims")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"any|off|[1-9]\d*(\s*,\s*[1-9]\d*)*", value):
            raise ValueError("neither `any` nor `off` nor a list of sizes such as `64,128,256`")
        return value

    @field_validator("auto_truncate")
    @classmethod
    def _one_policy(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("long_inputs") is LongInputsName.CHUNK:
            raise ValueError("contradicts `--long-inputs chunk`")
        return value

    @property
    def long_inputs_policy(self) -> LongInputsName:
        """What becomes of inputs longer than the model reads, when a request does not say."""
        return LongInputsName.TRUNCATE if self.auto_truncate else self.long_inputs

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients may use; the first names the queue and is shown in responses."""
        if self.served_model_name:
            return self.served_model_name
        short = Path(self.model).name or self.model
        return (short, self.model) if is_hub_id(self.model) and short != self.model else (short,)

    @property
    def chosen_model(self) -> str | None:
        """The first served name when the operator named a model; None leaves the choice to the queue."""
        return self.served_names[0] if {"model", "served_model_name"} & self.model_fields_set else None


def is_hub_id(model: str) -> bool:
    """Whether the name has the form `owner/name` of the Hub and is not a directory here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).is_dir()


def roles_of(name: str) -> tuple[Role, ...]:
    """The commands that read a setting."""
    extra = Settings.model_fields[name].json_schema_extra
    roles = extra["roles"] if isinstance(extra, dict) else []
    return tuple(Role(str(role)) for role in roles) if isinstance(roles, list) else ()


def flag_of(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names in the environment that begin like a setting and are none: most likely typing errors."""
    known = {variable_of(name) for name in Settings.model_fields}
    return sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known)
