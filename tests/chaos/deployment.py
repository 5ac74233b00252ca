"""A whole deployment of processes: Valkey, toy consumers and API processes, on this machine alone."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES

from . import toy
from .http import Client, Cut
from .journal import Journal
from .load import Load
from .processes import Process
from .proxy import Proxy
from .requests import Mixture
from .server import Server, free_port

KEYS = Keys("ek", toy.MODEL)
_START_S = 60.0


@dataclass(frozen=True)
class Device:
    """A consumer's toy device, and what is taken out of the consumer.

    Args:
        base_ms: of every pass.
        tokens_per_s: of a pass beyond that.
        most_tokens: a larger batch finds too little memory; 0 for no limit.
        budget: token budget of a micro-batch.
        ablate: name of an ablation of the consumer.
    """

    base_ms: float = 20.0
    tokens_per_s: float = 100_000.0
    most_tokens: int = 0
    budget: int = 4096
    ablate: str = ""

    def flags(self) -> list[str]:
        """For the command line of the toy consumer."""
        flags = ["--base-ms", self.base_ms, "--tokens-per-s", self.tokens_per_s, "--most-tokens", self.most_tokens]
        return [str(flag) for flag in [*flags, "--budget", self.budget, "--ablate", self.ablate]]


@dataclass
class Api:
    """An API process and where it listens."""

    process: Process
    port: int


@dataclass
class Deployment:
    """Started by `async with`, and gone without a trace after it.

    Args:
        folder: for logs and data.
        seed: of its requests and choices.
        device: of every consumer.
        consumers: started at once.
        apis: started at once.
        no_reconcile: API processes do not look for lost requests: an ablation.
        timeout_s: deadline of each request.
        settings: further settings of all processes, by variable name without its prefix.
        server: where the queue is.
        lose_every: consumers and APIs reach the queue through a proxy that loses every so-manieth reply; 0 for none.
        proxied: through a proxy in any case.
    """

    folder: Path
    seed: int
    device: Device = field(default_factory=Device)
    consumers: int = 2
    apis: int = 1
    no_reconcile: bool = False
    timeout_s: float = 30.0
    settings: Mapping[str, object] = field(default_factory=dict)
    server: Server = field(init=False)
    lose_every: int = 0
    proxied: bool = False

    def __post_init__(self) -> None:
        self.server = Server(self.folder)
        self.journal = Journal(self.folder / "journal")
        self.random = random.Random(self.seed)
        self.mixture = Mixture(self.seed)
        self.fleet: list[Process] = []
        self.api: list[Api] = []
        self._everything: list[Process] = []
        self._names = 0
        self.proxy: Proxy | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.server.start()
            if self.lose_every or self.proxied:
                self.proxy = await Proxy(self.server.port, self.lose_every).start(self.folder)
            for _ in range(self.consumers):
                self.start_consumer()
            for _ in range(self.apis):
                self.start_api()
            if self.consumers:
                await self.ready()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self.proxy is not None:
            await self.proxy.close()

    def _end(self) -> None:
        for process in [*self._everything, *([self.server.process] if self.server.process else [])]:
            process.end()

    def start_consumer(self, device: Device | None = None) -> Process:
        """One more consumer; it serves about a second later."""
        self._names += 1
        name = f"c{self._names}"
        argv = [sys.executable, "-m", "tests.chaos.stub_consumer", "--name", name, "--journal", str(self.journal.path)]
        process = self.start(name, [*argv, *(device or self.device).flags()])
        self.fleet.append(process)
        return process

    def start_api(self, port: int = 0) -> Api:
        """One more API process."""
        port = port or free_port()
        module = "tests.chaos.ablated_api" if self.no_reconcile else "embedstream.api"
        argv = [sys.executable, "-m", module, "--port", str(port)]
        api = Api(self.start(f"api{len(self.api)}", argv), port)
        self.api.append(api)
        return api

    def start(self, name: str, argv: list[str], changes: Mapping[str, object] | None = None) -> Process:
        """One more process on this queue.

        Args:
            name: for people, and of its log.
            argv: program and arguments.
            changes: settings that are its own, by variable name without its prefix; None for none of that name.
        """
        settings = {
            "REDIS_URL": self.proxy.url if self.proxy else self.server.url,
            "REQUEST_TIMEOUT_S": self.timeout_s,
            **self.settings,
            **(changes or {}),
        }
        variables = {f"EMBEDSTREAM_{key}": str(value) for key, value in settings.items() if value is not None}
        process = Process(name, argv, variables, self.folder / f"{name}.log")
        self._everything.append(process)
        return process

    async def ready(self, consumers: int | None = None) -> None:
        """Wait until all APIs answer and so many consumers live; by default those that were started and run."""
        wanted = len([process for process in self.fleet if process.code is None]) if consumers is None else consumers
        deadline_s = time.monotonic() + _START_S
        while True:
            with suppress(Cut, OSError):
                if len(await self.live()) >= wanted and all([await self._is_ready(api) for api in self.api]):
                    return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the deployment is not ready after {_START_S:g} s\n{self.log_tails()}")
            await asyncio.sleep(0.1)

    @staticmethod
    async def _is_ready(api: Api) -> bool:
        client = Client(api.port)
        try:
            return api.process.code is not None or (await client.get("/ready")).status == 200
        finally:
            client.close()

    async def call(self, *command: Any) -> Any:
        """One Redis command."""
        return await asyncio.to_thread(self.server.call, *command)

    async def live(self) -> list[str]:
        """Names of consumers with a heartbeat."""
        names: list[bytes] = await self.call("ZRANGE", KEYS.live, 0, -1)
        beats = [await self.call("EXISTS", KEYS.heartbeat(name.decode())) for name in names]
        return [name.decode() for name, there in zip(names, beats, strict=True) if there]

    async def pending(self, consumer: str) -> int:
        """Entries that Redis holds pending for a consumer."""
        count = 0
        for lane in LANES:
            held = await self.call("XPENDING", KEYS.lane(lane), GROUP)
            count += sum(one["pending"] for one in held["consumers"] if one["name"] == consumer.encode())
        return count

    async def queued(self) -> int:
        """Entries on both lanes."""
        return sum([int(await self.call("XLEN", KEYS.lane(lane))) for lane in LANES])

    async def until_queued(self, within_s: float = 3.0) -> bool:
        """Wait for a moment at which entries are on the lanes; whether there was one."""
        deadline_s = time.monotonic() + within_s
        while not (queued := await self.queued()) and time.monotonic() < deadline_s:
            await asyncio.sleep(self.random.uniform(0.0, 0.02))
        return queued > 0

    async def keys(self) -> set[str]:
        """All keys there are."""
        return {key.decode() for key in await self.call("KEYS", "*")}

    async def dead_letters(self) -> list[dict[bytes, bytes]]:
        """Fields of all dead letters."""
        entries = await self.call("XRANGE", KEYS.dead_letters, "-", "+")
        return [fields for _, fields in entries]

    def load(self, **changes: Any) -> Load:
        """Clients over all APIs, with the mixture of requests."""
        wanted: dict[str, Any] = {"ports": [api.port for api in self.api], "make": self.mixture.one}
        return Load(**{**wanted, "timeout_s": self.timeout_s, **changes})

    async def stop_holding(self, victim: Process, within_s: float = 2.0) -> bool:
        """SIGSTOP a consumer while it holds entries, and say whether it does."""
        deadline_s = time.monotonic() + within_s
        while True:
            victim.send(signal.SIGSTOP)
            if bit := await self.pending(victim.name) > 0:
                return bit
            if time.monotonic() > deadline_s:
                return False
            victim.send(signal.SIGCONT)
            await asyncio.sleep(self.random.uniform(0.005, 0.03))

    async def kill_holding(self, victim: Process) -> bool:
        """SIGKILL a consumer while it holds entries, and say whether it did."""
        bit = await self.stop_holding(victim)
        victim.end()
        self.fleet.remove(victim)
        return bit

    async def listening(self) -> None:
        """Wait until all APIs listen, whether or not they can serve."""
        for api in self.api:
            client = Client(api.port)
            while True:
                try:
                    await client.get("/livez")
                except Cut:
                    await asyncio.sleep(0.1)
                else:
                    break
            client.close()

    @asynccontextmanager
    async def restarting(self) -> AsyncIterator[list[Process]]:
        """Start a new consumer at once for each that dies, as `serve` does; yields those that died."""
        dead: list[Process] = []

        async def watch() -> None:
            while True:
                for process in [process for process in self.fleet if process.code is not None]:
                    dead.append(process)
                    self.fleet.remove(process)
                    self.start_consumer()
                await asyncio.sleep(0.05)

        task = asyncio.create_task(watch())
        try:
            yield dead
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def log_tails(self) -> str:
        """The last words of every process."""
        return "\n".join(process.log_tail() for process in self._everything[-8:])


class Sites:
    """Makes the deployments of a test, each in a folder of its own, to be entered with `async with`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._made = 0

    def __call__(self, **options: Any) -> Deployment:
        """A deployment; options are those of `Deployment`."""
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        return Deployment(folder, self._seed + self._made, **options)
