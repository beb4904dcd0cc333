"""A Hub on the loopback interface: as much of its HTTP interface as the real client needs, with faults on demand.

Repositories live in memory. A file ending in .safetensors, or a large one, is stored as LFS does: uploaded beside the
commit by its sha256, and downloaded from another host name through a redirect. Other files are git blobs.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READER = "hf_writer", "hf_reader"
OWNER = "lab"


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            len(self.data),
        )

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = {"size": len(self.data), "oid": self.oid}
        return found | (
            {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}} if self.lfs else {}
        )


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        listing = json.dumps(sorted((path, blob.oid) for path, blob in files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[self.branches["main"]].items()}


@dataclass
class Faults:
    """What goes wrong; all off by default."""

    cut_downloads: int = 0
    """Large downloads still to be broken off half way."""
    cut_uploads: int = 0
    """Large uploads still to be broken off."""
    corrupt_downloads: int = 0
    """Large downloads still to arrive with one byte changed."""
    fail: dict[str, int] = field(default_factory=dict)
    """Status by a piece of the request's path."""
    before_commit: list[Callable[[], None]] = field(default_factory=list)
    """Called, one per commit, before it is looked at."""


class Hub(ThreadingHTTPServer):
    """The state, and the server of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, str, bool]] = []
        self.url, self.cdn = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))

    def create(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit(
            "main",
            {
                path: Blob(data, path.endswith(".safetensors"))
                for path, data in (files or {".gitattributes": b""}).items()
            },
            "initial commit",
        )
        return repo

    def reset(self) -> None:
        self.repos, self.large, self.faults, self.requests = {}, {}, Faults(), []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the client or a fault broke is no news."""

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Failure(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    routes = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+|[^/]+)(/revision/(?P<rev>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<path>.*))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("GET", r"/lfs/(?P<oid>\w+)", "lfs_get"),
        ("(HEAD|GET)", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "file"),
    )

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.query, self.token = (
            parse_qs(parts.query),
            (self.headers.get("Authorization") or "").removeprefix("Bearer "),
        )
        self.server.requests.append((self.command, self.headers["Host"].split(":")[0], parts.path, bool(self.token)))
        try:
            for piece, status in self.server.faults.fail.items():
                if piece in parts.path:
                    raise Failure(status, message="The server says no.")
            for method, pattern, name in self.routes:
                if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, parts.path)):
                    given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**given)
            raise Failure(404, message=f"No route {self.command} {parts.path}")
        except Failure as failure:
            self.body()
            headers = {"X-Error-Code": failure.code, "X-Error-Message": failure.message}
            self.reply({"error": failure.message}, failure.status, {k: v for k, v in headers.items() if v})
        finally:
            self.__dict__.pop("body_read", None)

    do_POST = do_PUT = do_HEAD = do_GET

    def body(self) -> bytes:
        """What was sent; read once, before the answer, or the connection would be out of step."""
        if not hasattr(self, "body_read"):
            if self.headers.get("Transfer-Encoding") == "chunked":
                self.body_read = b"".join(iter(self._chunk, b""))
            else:
                self.body_read = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self.body_read

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return data

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who may see and write what ---

    def repo_of(self, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token not in (TOKEN, READER)):
            raise Failure(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and self.token not in (TOKEN,):
            raise Failure(403, "GatedRepo", f"Access to model {name} is restricted.")
        if write and self.token != TOKEN:
            raise Failure(
                403 if self.token else 401,
                "",
                "You don't have the rights to write here" if self.token else "Invalid username or password.",
            )
        return repo

    def files_of(self, repo: str, rev: str, write: bool = False) -> tuple[str, dict[str, Blob]]:
        found = self.repo_of(repo, write)
        sha = found.resolve(rev)
        if sha is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha, found.commits[sha]

    # --- the interface ---

    def create_repo(self) -> None:
        given = json.loads(self.body())
        if self.token != TOKEN or given.get("organization") not in (None, OWNER):
            raise Failure(
                403 if self.token else 401, "", "You don't have the rights to create a model under this namespace"
            )
        name = f"{given.get('organization') or OWNER}/{given['name']}"
        if name in self.server.repos:
            return self.reply({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        self.server.create(name, private=given.get("visibility") == "private" or given.get("private") is True)
        return self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body())["content"], re.S)
        data = yaml.safe_load(front.group(1)) if front else None
        bad = [] if isinstance(data, dict) else [{"message": "no metadata"}]
        bad += [
            {"message": f"{key} must be a list of strings"}
            for key in ("tags", "base_model")
            if not _strings((data or {}).get(key, []))
        ]
        self.reply({"errors": bad, "warnings": []}, 400 if bad else 200)

    def info(self, repo: str, rev: str = "main") -> None:
        sha, files = self.files_of(repo, rev)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in self.query:
            for sibling in siblings:
                blob = files[sibling["rfilename"]]
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        self.reply(
            {"id": repo, "sha": sha, "private": self.server.repos[repo].private, "siblings": siblings, "tags": []}
        )

    def refs(self, repo: str) -> None:
        found = self.repo_of(repo)
        lists = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        named = {
            key: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]
            for key, (kind, refs) in lists.items()
        }
        self.reply(named | {"converts": []})

    def tree(self, repo: str, rev: str, path: str = "") -> None:
        _, files = self.files_of(repo, rev)
        inside = {name: blob for name, blob in files.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise Failure(404, "EntryNotFound", f"{path} does not exist")
        self.reply([{"type": "file", "path": name} | blob.info() for name, blob in sorted(inside.items())])

    def paths_info(self, repo: str, rev: str) -> None:
        _, files = self.files_of(repo, rev)
        wanted = parse_qs(self.body().decode()).get("paths", [])
        self.reply([{"type": "file", "path": name} | files[name].info() for name in wanted if name in files])

    def branch(self, repo: str, rev: str) -> None:
        found = self.repo_of(repo, write=True)
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        if rev in found.branches:
            raise Failure(409, "", "Reference already exists")
        found.branches[rev] = found.resolve(start) or found.branches["main"]
        self.reply({})

    def preupload(self, repo: str, rev: str) -> None:
        _, files = self.files_of(repo, rev, write=True)
        given = json.loads(self.body())["files"]
        self.reply({"files": [self._mode(item, files.get(item["path"])) for item in given]})

    @staticmethod
    def _mode(item: dict[str, Any], old: Blob | None) -> dict[str, Any]:
        large = item["path"].endswith(".safetensors") or item["size"] > 2**20
        oid = {} if old is None else {"oid": old.sha256 if old.lfs else old.oid}
        return {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | oid

    def lfs_batch(self, repo: str) -> None:
        self.repo_of(repo, write=True)
        objects = []
        for item in json.loads(self.body())["objects"]:
            actions = {
                "upload": {"href": f"{self.server.cdn}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs-verify"},
            }
            objects.append(item | ({} if item["oid"] in self.server.large else {"actions": actions}))
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.server.faults.cut_uploads > 0:
            self.server.faults.cut_uploads -= 1
            self.close_connection = True
            return self.connection.close()
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Failure(400, "", "The content is not that of its name")
        self.server.large[oid] = data
        return self.reply(b"")

    def lfs_verify(self) -> None:
        given = json.loads(self.body())
        if len(self.server.large.get(given["oid"], b"")) != given["size"]:
            raise Failure(404, "", "Not uploaded")
        self.reply({})

    def commit(self, repo: str, rev: str) -> None:
        if self.server.faults.before_commit:
            self.server.faults.before_commit.pop(0)()
        lines = [json.loads(line) for line in self.body().splitlines()]
        sha, files = self.files_of(repo, rev, write=True)
        files, header = dict(files), lines[0]["value"]
        if header.get("parentCommit") not in (None, sha):
            raise Failure(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.server.large[value["oid"]], True)
            else:
                del files[value["path"]]
        found = self.server.repos[repo]
        new = found.commit(rev, files, header["summary"])
        self.reply({"commitUrl": f"{self.server.url}/{repo}/commit/{new}", "commitOid": new})

    def file(self, repo: str, rev: str, path: str) -> None:
        sha, files = self.files_of(repo, rev)
        if path not in files:
            failure = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": f"{path} does not exist",
                "X-Repo-Commit": sha,
            }
            return self.reply({"error": "Entry not found"}, 404, failure)
        blob, commit = files[path], {"X-Repo-Commit": sha}
        if not blob.lfs:
            return self._send(blob.data, commit | {"ETag": f'"{blob.oid}"'})
        self.server.large[blob.sha256] = blob.data
        linked = {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(len(blob.data)),
            "Location": f"{self.server.cdn}/lfs/{blob.sha256}",
        }
        return self.reply(b"", 302, commit | linked)

    def lfs_get(self, oid: str) -> None:
        data, faults = self.server.large[oid], self.server.faults
        if faults.corrupt_downloads > 0:
            faults.corrupt_downloads -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(data, {"ETag": f'"{oid}"'}, cut=faults.cut_downloads > 0)

    def _send(self, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted.group(1)) if wanted else 0
        headers = headers | ({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {})
        if not cut:
            return self.reply(data[start:], 206 if wanted else 200, headers)
        self.server.faults.cut_downloads -= 1
        self.send_response(206 if wanted else 200)
        for name, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[start : start + (len(data) - start) // 2])
        self.wfile.flush()
        self.close_connection = True
        return self.connection.shutdown(2)


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
