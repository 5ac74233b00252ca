"""A stand-in of the Hugging Face Hub on the loopback device, for the real huggingface_hub to talk to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

HUB_ID = "owner/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(folder: Path, *others: str, modules: bool = True) -> Path:
    """Files that look like a model's with a Dense module, and what else a repository holds."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    files = ["config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/config.json"]
    for name in (*files, "2_Dense/model.safetensors", *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder.name}")
    if modules:
        listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


class LoopbackHub:
    """Repositories by id: for each a table revision -> commit, and for each commit a folder.

    `asked` lists method and path of every request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.revisions: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Path] = {}
        self.asked: list[str] = []

    def put(self, hub_id: str, commit: str, folder: Path, *names: str) -> None:
        """Add a commit, which the branches and tags of these names are then at."""
        self.commits[hub_id, commit] = folder
        self.revisions.setdefault(hub_id, {}).update(dict.fromkeys((*names, commit), commit))

    def files_sent(self) -> list[str]:
        """The files that were fetched, by name."""
        fetched = [line.partition("/resolve/")[2] for line in self.asked if line.startswith("GET ")]
        return sorted(path.partition("/")[2] for path in fetched if path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        hub_id, (what, revision) = "/".join(parts[:2]), [*parts[2:4], "", ""][:2]
        if hub_id not in self.hub.revisions:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commit = self.hub.revisions[hub_id].get(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.commits[hub_id, commit]
        if what == "revision":
            return self._send(200, json.dumps({"id": hub_id, "sha": commit}).encode())
        if what == "tree":
            return self._send(200, json.dumps([_listed(folder, file) for file in sorted(folder.rglob("*"))]).encode())
        file = folder.joinpath(*parts[4:])
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        return self._send(200, file.read_bytes(), headers | {"ETag": f'"{_oid(file)}"'})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _listed(folder: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub without repositories, until the end of the context."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        handler.hub = LoopbackHub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined] # of _Handler
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield handler.hub  # type: ignore[attr-defined] # of _Handler
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def replaced_hub(cache: Path) -> Iterator[LoopbackHub]:
    """A Hub that huggingface_hub in this process takes for the real one; its variables are read when it is imported."""
    with loopback_hub() as stand_in, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", stand_in.url)
        template = f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield stand_in
        huggingface_hub.close_session()  # its connections would be closed by the garbage collector, with a warning


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
