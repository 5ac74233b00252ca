"""A fleet of one's own: the embedded Valkey and consumers, for a command that finds no server.

It is private: without a run file nobody else joins what goes away with the command.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from functools import partial

from embedstream.consumer import requirements
from embedstream.shared import load_failures, models, runfile
from embedstream.shared.errors import Misconfigured, ModelLoadError
from embedstream.shared.flags import environment_of, without_settings
from embedstream.shared.settings import LogLevel, Role, Settings

from . import gpus
from .children import Child
from .signals import Signals
from .tending import Command, OwnValkey, Tending, launch, role_command, share_of_cores, tell_end

_MOST_HELD = 200


class OwnFleet:
    """The embedded Valkey and consumers as children, started again when they die. Call it from the main thread.

    Args:
        settings: what the consumers serve, and how.
        signals: entered by the caller.
        command: builds the consumers' command lines.

    Raises:
        Misconfigured: packages of consumers are missing, or no consumer is asked for.
        ModelLoadError: the model can be nowhere.
    """

    def __init__(self, settings: Settings, signals: Signals, command: Command = role_command) -> None:
        if missing := requirements.missing():
            raise Misconfigured(f"{', '.join(missing)} not installed; {requirements.REMEDY}")
        if settings.consumers == 0:
            raise Misconfigured("No server was found to join, and with --consumers 0 nothing would be embedded.")
        models.check(settings.model, settings.revision)
        if settings.chat_template is not None and not settings.chat_template.is_file():
            raise Misconfigured(f"--chat-template {settings.chat_template}: there is no such file")
        settings, self._places = gpus.placed(settings, os.environ)
        self._settings = settings.model_copy(update={"data_dir": None})  # the queue need not outlive us
        self._signals = signals
        self._command = command
        self._tending = Tending(signals, settings.shutdown_timeout_s, self._ended)
        self._words = Words()
        self._valkey: OwnValkey | None = None
        self._consumers: list[Child] = []

    @property
    def settings(self) -> Settings:
        """The settings with the URL of its queue, once it is started."""
        return self._settings

    def start(self) -> None:
        """Start everything, without waiting for the model.

        Raises:
            Unavailable: there is no Valkey.
        """
        runfile.sweep()  # what a killed command has left behind
        self._valkey = OwnValkey(self._settings)
        self._valkey.start(self._signals)
        self._settings = self._settings.model_copy(update={"redis_url": self._valkey.url})
        replaced = {"log_level": LogLevel.WARNING, "metrics_port": None, "data_dir": None}
        environment = without_settings(os.environ) | environment_of(self._settings, **replaced)
        environment |= share_of_cores(self._settings)
        command = self._command(Role.CONSUMER, None)
        self._consumers = [
            Child(f"consumer {number}", partial(launch, command, environment | place, self._words.fileno))
            for number, place in enumerate(self._places, 1)
        ]
        for child in self._consumers:
            child.start()

    def look_after(self) -> float:
        """Start again what has died.

        Returns:
            Seconds until it wants to be called again; infinite where nothing is to be done.

        Raises:
            ModelLoadError: no consumer can serve the model; with the reason that one left.
        """
        valkey = [] if self._valkey is None else [self._valkey.child]
        longest_s = self._tending.look_after([*valkey, *self._consumers])
        if self._consumers and all(child.final for child in self._consumers):
            raise ModelLoadError(self._reason_left())
        return longest_s

    def serving(self) -> None:
        """The model is loaded: what consumers have to say is said from now on."""
        self._words.release()

    def stop(self) -> None:
        """Stop consumers, then Valkey, and remove what they left."""
        self._tending.stop(self._consumers)
        if self._valkey is not None:
            self._tending.stop([self._valkey.child])
            self._valkey.remove()
        self._words.close()

    def _ended(self, child: Child, code: int) -> None:
        if not child.final:  # then its reason is all there is to say
            self._words.release()
            tell_end(child, code)

    def _reason_left(self) -> str:
        """Why a consumer could not serve the model, as it has left it in Redis, or as it has said."""
        url, names = self._settings.redis_url, self._settings.served_names
        left = load_failures.newest_at(url, self._settings.key_prefix, names[0]) if url else None
        return left or self._words.last_line.removeprefix("embedstream: ") or "No consumer can serve the model."


class Words:
    """What consumers write on stderr, brought to ours line by line, so that a progress bar stays whole.

    Held back until `release`: when a model cannot be loaded, its reason says it all.
    """

    def __init__(self) -> None:
        self._reader, self.fileno = os.pipe()
        self._held: deque[str] | None = deque(maxlen=_MOST_HELD)
        self._lock = threading.Lock()
        self.last_line = ""
        self._thread = threading.Thread(target=self._relay, name="words", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Bring what was held back, and from now on everything at once."""
        with self._lock:
            held, self._held = self._held, None
            for line in held or ():
                _write(line)

    def close(self) -> None:
        """No child is left that could write."""
        os.close(self.fileno)
        self._thread.join(1.0)  # longer only if a process that we do not know holds the other end

    def _relay(self) -> None:
        with os.fdopen(self._reader, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                with self._lock:
                    self.last_line = line.strip() or self.last_line
                    if self._held is None:
                        _write(line)
                    else:
                        self._held.append(line)


def _write(line: str) -> None:
    sys.stderr.write(line)
