"""Every metric, in one place: names, labels and units. `docs/metrics.md` lists them, and a test compares.

Processes of one `serve` write to files of one folder, named by `PROMETHEUS_MULTIPROC_DIR`, and any of them can show the
sum of all; a process by itself keeps its numbers in memory. The library decides when it is imported, so the variable
must be set before.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from .metric_files import AllProcesses, shared_folder, take_name

take_name()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# The HTTP tier
HTTP_REQUESTS = Counter("embedstream_http_requests", "HTTP requests, by route and status.", ["path", "status"])
"""Paths: the routes' templates, and `other` for the rest. Status 499: the client left before; 0: no answer."""
HTTP_SECONDS = Histogram(
    "embedstream_http_seconds", "From an HTTP request's head to the end of its answer.", ["path"], buckets=_SECONDS
)

HTTP_CONNECTIONS = Gauge(
    "embedstream_http_connections", "Open connections of HTTP clients.", multiprocess_mode="livesum"
)
BODY_BYTES = Gauge(
    "embedstream_body_bytes", "Bytes of the bodies of HTTP requests under way, inflated.", multiprocess_mode="livesum"
)
KEYS_RELOADS = Counter("embedstream_keys_reloads", "Changes of the keys file that were read.", ["outcome"])
"""Outcomes: ok; failed: the file is broken, and the keys of before still count."""
KEY_TOKENS = Counter("embedstream_key_tokens", "Tokens of requests that were taken, by the name of their key.", ["key"])
"""Keys: at most `--key-labels` names, and `other` for the rest."""
QUOTA_REFUSALS = Counter("embedstream_quota_refusals", "Requests refused because a key's quota is used up.", ["key"])
QUOTA_UNCHECKED = Counter(
    "embedstream_quota_unchecked", "Requests let pass unchecked, because Redis did not say what is left of a quota."
)

TRUNCATED_INPUTS = Counter("embedstream_truncated_inputs", "Inputs of answered HTTP requests that lost tokens.")
CAST_OVERFLOWS = Counter(
    "embedstream_cast_overflows",
    "Vectors sent over HTTP with a component too large for their number format.",
    ["dtype"],
)

# Callers: API processes and producers
REQUESTS = Counter("embedstream_requests", "Requests given to the queue, by how they ended.", ["lane", "outcome"])
"""Outcomes: ok, refused (429), unavailable (503), timeout (504), failed, abandoned, invalid."""
REQUEST_SECONDS = Histogram(
    "embedstream_request_seconds", "From enqueueing a request to its whole result.", ["lane"], buckets=_SECONDS
)
SENT_AGAIN = Counter(
    "embedstream_jobs_sent_again", "Jobs that were on neither side and were enqueued once more.", ["lane"]
)
DUPLICATES = Counter("embedstream_duplicate_parts", "Result parts that came twice, or after their request had ended.")
UNDELIVERED_BYTES = Gauge(
    "embedstream_undelivered_bytes",
    "Bytes of results that were asked for and have not come.",
    multiprocess_mode="livesum",
)
HELD_RESULT_BYTES = Gauge(
    "embedstream_held_result_bytes",
    "Bytes of results that have come and wait for an earlier part of their answer, or for its reader.",
    multiprocess_mode="livesum",
)
LANE_JOBS = Gauge(
    "embedstream_lane_jobs", "Jobs on a lane, waiting or running.", ["lane"], multiprocess_mode="mostrecent"
)
LANE_BYTES = Gauge(
    "embedstream_lane_bytes", "Bytes of jobs on a lane, at most.", ["lane"], multiprocess_mode="mostrecent"
)
PREDICTED_WAIT_SECONDS = Gauge(
    "embedstream_predicted_wait_seconds", "Wait of a request that comes now.", ["lane"], multiprocess_mode="mostrecent"
)
LIVE_CONSUMERS = Gauge("embedstream_live_consumers", "Consumers with a heartbeat.", multiprocess_mode="mostrecent")
DEAD_LETTERS_KEPT = Gauge(
    "embedstream_dead_letters_kept", "Dead letters of the model; alert on any.", multiprocess_mode="mostrecent"
)

# Consumers
QUEUE_WAIT_SECONDS = Histogram(
    "embedstream_queue_wait_seconds", "From enqueueing a job to its first forward pass.", ["lane"], buckets=_SECONDS
)
BATCH_SECONDS = Histogram("embedstream_batch_seconds", "One forward pass with pooling.", buckets=_SECONDS)
BATCH_ROWS = Histogram("embedstream_batch_rows", "Sequences in one forward pass.", buckets=_SIZES)
TOKENS = Counter("embedstream_tokens", "Tokens computed, without padding.", ["lane"])
JOBS = Counter("embedstream_jobs", "Jobs answered, by the worst status among their rows.", ["lane", "status"])
"""Statuses: the names of `results.Status` in lower case."""
JOBS_TAKEN_OVER = Counter(
    "embedstream_jobs_taken_over", "Jobs taken from others, or found in one's own pending list.", ["reason"]
)
"""Reasons: dead (its consumer died), released (given back), lost_reply (our own read went astray), backstop."""
SUSPECT_RUNS = Counter("embedstream_suspect_runs", "Jobs run apart because a consumer had died with them.", ["how"])
"""How: group, alone."""
SPLIT_BATCHES = Counter("embedstream_split_batches", "Batches cut in two after a failure.", ["reason"])
"""Reasons: error, out_of_memory."""
DEAD_LETTERS = Counter("embedstream_dead_letters", "Jobs given up and kept as dead letters.", ["reason"])
"""Reasons: malformed, killed_consumers."""
DEVICE_SECONDS = Counter("embedstream_device_seconds", "What the device's thread did with its time.", ["state"])
"""States: busy, no_work (empty lanes), undelivered (Redis takes no results), apart (setting a suspect aside)."""
WATCHDOG_TRIPS = Counter("embedstream_watchdog_trips", "Batches that counted as hung.")


def registry() -> CollectorRegistry:
    """What a scrape of this process shows: the sum of all processes that share a folder, else this one's numbers."""
    folder = shared_folder()
    if folder is None:
        return REGISTRY
    summed = CollectorRegistry()
    summed.register(AllProcesses(folder))
    return summed
