"""All in one: the supervisor behind `embedstream serve`.

It binds the HTTP socket, starts the embedded Valkey, the consumers and the API processes, starts again what dies,
and stops them in the order API, consumers, Valkey: each tier finishes what it has while the next one still serves it.
Everything runs on the main thread: Linux ties the children's life to the thread that started them.

Exit codes are those of `embedstream.shared.exits`: 0 after SIGINT or SIGTERM, 69 when the port, the data folder or
Valkey is not to be had, 78 when all consumers (or all API processes) say that restarting them is no help.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

from embedstream.shared import exits, load_failures, logs, runfile
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.flags import environment_of, without_settings
from embedstream.shared.logs import get_logger
from embedstream.shared.processes import own_identity
from embedstream.shared.settings import Role, Settings

from . import gpus
from .children import Child
from .listener import bind, reachable_host, url_of
from .metrics_folder import MetricsFolder
from .readiness import Readiness
from .signals import Signals
from .tending import Command, OwnValkey, Tending, launch, role_command, share_of_cores, tell_end
from .welcome import ready_block

log = get_logger()


def run(settings: Settings, *, command: Command = role_command) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises:
        Unavailable: the port, the data folder or Valkey is not to be had.
        ModelLoadError: no consumer can serve the model.
    """
    logs.configure(settings, Role.SERVE)
    with Signals() as signals, bind(settings.host, settings.port) as listener:
        supervisor = Supervisor(settings, listener, signals, command)
        try:
            supervisor.start()
            return supervisor.watch()
        finally:
            supervisor.stop()


class Supervisor:
    """The processes of one `serve`, from start to stop.

    Args:
        settings: as given to `serve`.
        listener: the listening HTTP socket.
        signals: entered by the caller.
        command: builds the children's command lines.
    """

    def __init__(self, settings: Settings, listener: socket.socket, signals: Signals, command: Command) -> None:
        self._settings, self._places = gpus.placed(settings, os.environ)
        self._listener = listener
        self._port: int = listener.getsockname()[1]
        self._url = url_of(settings.host, self._port)
        self._signals = signals
        self._command = command
        self._tending = Tending(signals, settings.shutdown_timeout_s, self._ended)
        self._redis_url = ""
        self._valkey: OwnValkey | None = None
        self._consumers: list[Child] = []
        self._apis: list[Child] = []
        self._metrics: MetricsFolder | None = None
        self._run_path: Path | None = None
        self._readiness: Readiness | None = None

    def start(self) -> None:
        """Start everything, without waiting for the model."""
        for left in runfile.sweep():
            log.info("serve.leftover_removed", path=str(left))
        if self._settings.redis_url and self._settings.data_dir:
            log.warning("serve.data_dir_unused", reason="the queue is at --redis-url")
        if self._settings.metrics_port is not None:
            log.warning("serve.metrics_port_unused", reason="the API's /metrics shows all processes")
        redis_url = self._redis_url = self._settings.redis_url or self._start_valkey()
        if self._signals.stopping:
            return
        self._run_path = runfile.write(self._run_file(redis_url))
        log.info("model.loading", model=self._settings.model, consumers=self._settings.consumers)
        environment = without_settings(os.environ) | environment_of(
            self._settings,
            redis_url=redis_url,
            port=self._port,
            metrics_port=None,  # several consumers cannot share it
        )
        self._metrics = metrics = MetricsFolder()
        consumers = [(f"consumer {number}", place) for number, place in enumerate(self._places, 1)]
        apis = [f"api {number}" for number in range(1, self._settings.api_workers + 1)]
        cores = share_of_cores(self._settings)
        self._consumers = [
            Child(name, partial(self._launch, Role.CONSUMER, environment | cores | place | metrics.variables_of(name)))
            for name, place in consumers
        ]
        self._apis = [
            Child(name, partial(self._launch, Role.API, environment | metrics.variables_of(name))) for name in apis
        ]
        for child in [*self._consumers, *self._apis]:
            child.start()
        # Without consumers of its own it waits for nobody: others may join later.
        path = "/health" if self._consumers else "/livez"
        self._readiness = Readiness(reachable_host(self._settings.host), self._port, path)

    def watch(self) -> int:
        """Start again what dies, until somebody asks us to stop or nothing can run. Returns the exit code.

        Raises:
            ModelLoadError: no consumer can serve the model; with the reason that one left.
        """
        while not self._signals.stopping:
            longest_s = self._tending.look_after(self._children())
            for tier in (self._consumers, self._apis):
                if tier and all(child.final for child in tier):
                    log.error("serve.nothing_left_to_run", processes=[child.name for child in tier])
                    if tier is self._consumers and (reason := self._reason_left()):
                        raise ModelLoadError(reason)  # said once more, where people look first: in the last line
                    return exits.FINAL
            self._wait(longest_s)
        return exits.OK

    def stop(self) -> None:
        """Stop API, consumers, Valkey, in this order, and remove the run file and the private folders."""
        log.info("serve.stopping")
        self._listener.close()  # or new clients would wait in its queue for nobody
        if self._readiness is not None:
            self._readiness.close()
        self._tending.stop(self._apis)
        self._tending.stop(self._consumers)
        if self._metrics is not None:
            self._metrics.remove()
        if self._run_path is not None:
            self._run_path.unlink(missing_ok=True)
        if self._valkey is not None:
            self._tending.stop([self._valkey.child])
            self._valkey.remove()

    def _start_valkey(self) -> str:
        log.info("valkey.starting", data_dir=str(self._settings.data_dir or "in memory"))
        self._valkey = OwnValkey(self._settings)
        self._valkey.start(self._signals)
        return self._valkey.url

    def _run_file(self, redis_url: str) -> runfile.RunFile:
        model = Path(self._settings.model)
        return runfile.RunFile(
            process=own_identity(),
            redis_url=redis_url,
            http_url=self._url,
            port=self._port,
            model=str(model.absolute()) if model.is_dir() else self._settings.model,
            served_names=self._settings.served_names,
            key_prefix=self._settings.key_prefix,
            folder=self._valkey.folder if self._valkey else None,
        )

    def _launch(self, role: Role, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        fd = self._listener.fileno() if role is Role.API else None
        # To stderr: stdout carries the ready block alone.
        return launch(self._command(role, fd), environment, sys.stderr.fileno(), fd)

    def _children(self) -> list[Child]:
        return [*([self._valkey.child] if self._valkey else []), *self._consumers, *self._apis]

    def _ended(self, child: Child, code: int) -> None:
        tell_end(child, code)
        if self._metrics is not None:
            self._metrics.ended(child.name)

    def _reason_left(self) -> str | None:
        """Why a consumer could not serve the model, as it has left it in Redis."""
        return load_failures.newest_at(self._redis_url, self._settings.key_prefix, self._settings.served_names[0])

    def _wait(self, longest_s: float) -> None:
        """Sleep until something is to be done, `longest_s` at most."""
        if self._readiness is None or self._readiness.is_over:
            self._signals.wait(longest_s if math.isfinite(longest_s) else None)
            return
        self._readiness.step(self._signals, longest_s)
        if self._readiness.is_over:
            print(  # noqa: T201
                ready_block(self._settings, self._url, self._redis_url, elapsed_s=self._readiness.elapsed_s), flush=True
            )
