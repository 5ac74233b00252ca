"""What can be told of settings before anything is started: one line now, instead of one from each process later."""

from __future__ import annotations

from embedstream.shared import models
from embedstream.shared.errors import Misconfigured
from embedstream.shared.settings import Settings, TokenIds


def check(settings: Settings) -> None:
    """Refuse settings of `serve` that name something that is not there.

    Raises:
        ModelLoadError: the model can be nowhere.
        Misconfigured: a file that a setting names cannot be read, or says nothing.
    """
    if settings.consumers != 0:
        models.check(settings.model, settings.revision)
        if settings.chat_template is not None and not settings.chat_template.is_file():
            raise Misconfigured(f"--chat-template {settings.chat_template}: there is no such file")
    if settings.api_keys_file is not None:
        from embedstream.api import keys_file

        keys_file.read(settings.api_keys_file)
    if settings.token_ids is TokenIds.CL100K:
        from embedstream.api import foreign_ids

        foreign_ids.check(settings)
