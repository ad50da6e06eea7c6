"""A Hugging Face Hub on 127.0.0.1 for tests: as much of its HTTP interface as huggingface_hub's real client uses to
create a repository, to commit files, and to download a snapshot or a single file.

    with HubServer() as hub:
        ...  # a client process with HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET=1 and HF_HOME in a new
             folder

What it keeps of the real one's behaviour: error codes in headers, ETags and commit ids on files, safetensors by the LFS
protocol and behind a redirect, 401 for writes without the token and for repositories that are not there, a refusal of
cards without sound front matter. What it is not: it has no Xet storage, no pull requests, and a revision's history is a
list of whole trees.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_test_server"


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class StoredFile:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Of what git holds: the content, or the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return git_blob_id(pointer.encode() if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, StoredFile], message: str) -> str:
        parent = self.branches.get(branch, "")
        tree = {**self.commits.get(parent, {}), **files}
        listing = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(tree.items()))
        sha = hashlib.sha1(f"{parent}\n{message}\n{listing}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubRefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


class Listener(ThreadingHTTPServer):
    """A free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self, hub: "HubServer") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubServer:
    """Starts with the `with` block and stops with it. Large files lie on another port, since the client treats what its
    Hub redirects to differently if it is the Hub's own."""

    def __init__(self) -> None:
        self.front, self.storage = Listener(self), Listener(self)
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method and path of every request, in order."""

    @property
    def url(self) -> str:
        return self.front.url

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that is there before any client asks."""
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", {path: StoredFile(content) for path, content in files.items()}, "initial commit")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, StoredFile]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def __enter__(self) -> Self:
        for listener in (self.front, self.storage):
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for listener in (self.front, self.storage):
            listener.shutdown()
            listener.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this, each answer waits for a delayed acknowledgement.
    disable_nagle_algorithm = True
    server: Listener

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.body, self.query = self.read_body(), parse_qs(address.query)
        self.hub.requests.append(f"{self.command} {address.path}")
        try:
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, address.path)
                if found and self.command in method.split():
                    action(self, *map(unquote, found.groups()))
                    return
            raise HubRefusalError(404, f"the test server has no {self.command} {address.path}")
        except HubRefusalError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer(json.dumps({"error": error.message, **error.extra}).encode(), error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, values: Any, status: int = 200) -> None:
        self.answer(json.dumps(values).encode(), status, {"Content-Type": "application/json"})

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.authorized:
            raise HubRefusalError(401, "Invalid username or password.")

    def repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.authorized):
            raise HubRefusalError(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise HubRefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def create_repository(self) -> None:
        self.require_token()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'someone'}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise HubRefusalError(409, "You already created this model repo", url=url)
        self.hub.add(
            repo_id,
            {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"},
            asked.get("visibility") == "private",
        )
        self.json({"url": url, "name": repo_id})

    def create_branch(self, repo_id: str, branch: str) -> None:
        self.require_token()
        repository = self.repository(repo_id)
        if branch in repository.branches:
            raise HubRefusalError(409, f"Reference already exists: {branch}")
        repository.branches[branch] = self.commit_of(repository, "main")
        self.json({})

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        sha = self.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": repository.private,
                "tags": [],
                "siblings": siblings,
            }
        )

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        entries = []
        for path, file in sorted(repository.commits[self.commit_of(repository, revision)].items()):
            entry = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content)}
            entries.append(
                entry
                | ({"lfs": {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}} if file.lfs else {})
            )
        self.json(entries)

    def validate_card(self) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            data = None
        if not isinstance(data, dict) or not data.get("library_name"):
            self.json({"errors": [{"message": "no sound front matter"}], "warnings": []}, 400)
        else:
            self.json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.require_token()
        repository = self.repository(repo_id)
        present = repository.commits[self.commit_of(repository, revision)]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = present[path].etag if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        self.require_token()
        self.repository(repo_id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = asked["oid"] in self.hub.uploads
            action = {} if known else {"actions": {"upload": {"href": f"{self.hub.storage.url}/lfs/{asked['oid']}"}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **action})
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubRefusalError(400, f"{len(self.body)} bytes that are not those of {oid}")
        self.hub.uploads[oid] = self.body
        self.answer(b"")

    def lfs_get(self, oid: str) -> None:
        self.answer(self.hub.uploads[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        self.require_token()
        repository = self.repository(repo_id)
        if revision not in repository.branches:
            raise HubRefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = {}, ""
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = StoredFile(self.hub.uploads[value["oid"]], lfs=True)
                case other:
                    raise HubRefusalError(400, f"the test server cannot commit a {other}")
        sha = repository.commit(revision, files, message)
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def resolve_file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        sha = self.commit_of(repository, revision)
        headers = {"X-Repo-Commit": sha}
        file = repository.commits[sha].get(path)
        if file is None:
            self.answer(b"", 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif file.lfs:
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            self.answer(b"", 302, headers | linked | {"Location": f"{self.hub.storage.url}/lfs/{file.sha256}"})
        else:
            self.answer(file.content, headers=headers | {"ETag": f'"{file.etag}"'})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", Handler.model_info),
    ("GET", f"/api/models/{REPO}", Handler.model_info),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", "/lfs/([0-9a-f]{64})", Handler.lfs_get),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve_file),
]
