"""The folder in which the children of one `serve` add up their metrics."""

from __future__ import annotations

import shutil
from contextlib import suppress

from embedstream.shared import runfile
from embedstream.shared.metric_files import FOLDER_VARIABLE, PROCESS_VARIABLE, forget
from embedstream.shared.processes import own_identity


class MetricsFolder:
    """A private folder that is gone after a stop; after a crash the next `serve` sweeps it, by its name."""

    def __init__(self) -> None:
        self.path = runfile.create_private_folder(own_identity())

    def variables_of(self, child: str) -> dict[str, str]:
        """What a child needs to write here; they win over a folder that the user's environment names.

        Args:
            child: its name among all children, the same after a restart.
        """
        return {FOLDER_VARIABLE: str(self.path), PROCESS_VARIABLE: _file_name_of(child)}

    def ended(self, child: str) -> None:
        """Take the gauges of a child that has ended out of the sums."""
        forget(self.path, _file_name_of(child))

    def remove(self) -> None:
        """Remove the folder, once nobody writes to it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)


def _file_name_of(child: str) -> str:
    return child.replace(" ", "-")
