# SPDX-License-Identifier: Apache-2.0

"""A small Hugging Face hub on this machine: it serves files of a folder as the real one does, to the real client."""

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", "refs/pr/1", COMMIT)
RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """Serves ``<root>/<owner>/<repository>/<path>``, the same for all revisions.

    Args:
        root (Path): Folder.

    Attributes:
        asked (list[str]): Method and address of every request.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        """For ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        found = RESOLVE.fullmatch(self.path.replace("%2F", "/"))
        if not found or not (self.server.root / found["repository"]).is_dir():
            return self.refuse(401, "RepoNotFound")
        if found["repository"].endswith("/gated"):
            return self.refuse(403, "GatedRepo")
        if found["revision"] not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        file = self.server.root / found["repository"] / found["path"]
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(hub: Hub) -> Generator[None, None, None]:
    """Let a hub answer while the block runs; afterwards its address is refused."""
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
