"""A stand-in for the hub: an HTTP server whose repositories are folders, for the calls of uploads and downloads."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, **content) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.requests.append(self.path)
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.root / repository).mkdir(parents=True, exist_ok=True)
            self.json(url=f"{here}/{repository}")
        elif self.path == "/api/validate-yaml":
            self.json(warnings=[], errors=[])
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.json(files=[{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths])
        elif found := re.fullmatch(r"/api/models/(.+)/commit/[^/?]+(\?.*)?", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.root / found[1] / line["value"]["path"]
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            self.json(success=True, commitOid=COMMIT, commitUrl=f"{here}/{found[1]}/commit/{COMMIT}", hookOutput="")
        else:
            self.answer(200)

    def do_GET(self):
        found = re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", self.path)
        file = self.root / found[1] / found[2] if found else None
        if file is None or not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        content = file.read_bytes()
        state = hashlib.sha1(content).hexdigest()  # a commit for each state of the file, so that no cache answers
        self.answer(200, content, ETag=f'"{state}"', X_Repo_Commit=state)

    do_HEAD = do_GET


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the paths of the POST requests so far, while open."""
    requests: list[str] = []
    handler = type("Bound", (Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
