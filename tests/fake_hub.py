"""The Hugging Face hub as huggingface_hub sees it, on this machine: repositories, commits, and what can go wrong.

It answers what ``snapshot_download`` and ``hf_hub_download`` ask: a model's commit, its tree, and its files; large ones
are redirected to a second address, as the hub does with its storage. Without Xet.
"""

import dataclasses
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt", ".msgpack")  # kept in LFS, whose ETag is the SHA-256; the others' is git's
SIGNATURE = "X-Amz-Signature=0123456789abcdef"  # what the hub adds to an address of its storage


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    storage: bool  # asked of the second address

    @property
    def token(self) -> str | None:
        """The one that it was sent with, where it belongs."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclasses.dataclass
class Repository:
    """``branches`` name commits, and ``commits`` hold files."""

    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    gated: bool = False  # anyone sees the names of its files, and members the files
    private: bool = False  # only members know that it is there

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Move ``branch`` to a new commit, of ``files`` -> the commit."""
        text = repr((len(self.commits), branch, sorted((path, digest(path, raw)) for path, raw in files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


class FakeHub:
    """A context in which ``url`` is to be the client's HF_ENDPOINT.

    ``requests`` lists what was asked for. Tests may change ``repositories``, and:
      members: tokens with which gated and private repositories open. revoked: tokens that are no longer good.
      broken: path of a file -> how many times more the line breaks in its middle, and how: "cut" short or "reset".
      altered: paths of files that are sent with a bit flipped, under the SHA-256 that they should have.
      down: the status with which everything is answered, 503 for one.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.members: set[str] = set()
        self.revoked: set[str] = set()
        self.broken: dict[str, tuple[int, str]] = {}
        self.altered: set[str] = set()
        self.down: int | None = None
        self.requests: list[Request] = []
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"  # a host of another name, to which no token may go

    def __enter__(self) -> "FakeHub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing listens at ``url`` from now on. May be called twice."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files(self) -> list[str]:
        """Paths of the files whose content was asked for, since ``requests`` was last cleared."""
        asked = [re.fullmatch(r"/.+?/.+?/resolve/.+?/(.+)", r.path) for r in self.requests if r.method == "HEAD"]
        return sorted({unquote(match[1]) for match in asked if match is not None})


def read(folder: Path) -> dict[str, bytes]:
    """A folder's files, by their paths in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digest(path: str, raw: bytes) -> str:
    """The ETag of a file: SHA-256 of what is kept in LFS, and the name that git has for others."""
    return hashlib.sha256(raw).hexdigest() if path.endswith(LARGE) else _git_name(raw)


def _git_name(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


# ---- answers -------------------------------------------------------------------------------------------------------


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def shutdown_request(self, request: socket.socket) -> None:
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _AT_ONCE:
            self.close_request(request)  # without the orderly end that comes before it elsewhere
        else:
            super().shutdown_request(request)


_AT_ONCE = struct.pack("ii", 1, 0)  # closed with a reset


@dataclasses.dataclass
class _Refusal(Exception):
    status: int
    code: str  # by which huggingface_hub tells errors apart
    message: str


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        storage = self.server is hub._servers[1]
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, storage)
        hub.requests.append(request)
        try:
            if hub.down is not None:
                raise _Refusal(hub.down, "", "Down for maintenance")
            if request.token in hub.revoked:
                raise _Refusal(401, "", "Invalid credentials in Authorization header")
            path = urlsplit(self.path).path
            for pattern, answer in _ROUTES[storage].items():
                if (match := re.fullmatch(pattern, path)) is not None:
                    return answer(self, hub, request, *map(unquote, match.groups()))
            raise _Refusal(404, "", "Not Found")
        except _Refusal as refusal:
            body = json.dumps({"error": refusal.message}).encode()
            named = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._answer(refusal.status, body, named | {"X-Error-Message": refusal.message})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _info(self, hub: FakeHub, request: Request, repo: str, revision: str | None = None) -> None:
        repository, commit = _find(hub, request, repo, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        self._json({"id": repo, "sha": commit, "siblings": siblings})

    def _tree(self, hub: FakeHub, request: Request, repo: str, revision: str) -> None:
        repository, commit = _find(hub, request, repo, revision)
        entries = []
        for path, raw in repository.commits[commit].items():
            lfs = {"oid": digest(path, raw), "size": len(raw), "pointerSize": 134}
            entry = {"type": "file", "path": path, "size": len(raw), "oid": _git_name(raw)}
            entries.append(entry | ({"lfs": lfs} if path.endswith(LARGE) else {}))
        self._json(entries)

    def _resolve(self, hub: FakeHub, request: Request, repo: str, revision: str, path: str) -> None:
        repository, commit = _find(hub, request, repo, revision)
        if repository.gated and request.token not in hub.members:
            status = 401 if request.token is None else 403
            raise _Refusal(status, "GatedRepo", f"Access to model {repo} is restricted")
        raw = repository.commits[commit].get(path)
        if raw is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        etag = f'"{digest(path, raw)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag}
        if path.endswith(LARGE):
            headers |= {"Location": f"{hub.storage}/{repo}/{commit}/{path}?{SIGNATURE}"}
            return self._answer(302, b"", headers | {"X-Linked-Etag": etag, "X-Linked-Size": str(len(raw))})
        self._send(hub, path, raw, headers)

    def _stored(self, hub: FakeHub, request: Request, repo: str, commit: str, path: str) -> None:
        self._send(hub, path, hub.repositories[repo].commits[commit][path], {})

    def _send(self, hub: FakeHub, path: str, raw: bytes, headers: dict[str, str]) -> None:
        if path in hub.altered:
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(raw))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        times, how = hub.broken.get(path, (0, ""))
        if not times:
            self.wfile.write(raw)
            return
        hub.broken[path] = times - 1, how
        self.wfile.write(raw[: len(raw) // 2])
        self.close_connection = True
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)


_ROUTES = (
    {
        r"/api/models/([^/]+/[^/]+)": _Handler._info,
        r"/api/models/([^/]+/[^/]+)/revision/([^/]+)": _Handler._info,
        r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": _Handler._tree,
        r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": _Handler._resolve,
    },
    {r"/([^/]+/[^/]+)/([^/]+)/(.+)": _Handler._stored},
)


def _find(hub: FakeHub, request: Request, repo: str, revision: str) -> tuple[Repository, str]:
    """-> (repository, commit)."""
    repository = hub.repositories.get(repo)
    if repository is None or (repository.private and request.token not in hub.members):
        raise _Refusal(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repository, commit
