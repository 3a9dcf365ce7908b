"""A Hub of datasets and models over real sockets: what huggingface_hub's client asks of one.

Written from the client's published behaviour: create, preupload, LFS upload, commit, branches,
tree, resolve, card check. It keeps commits in memory, by branch.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from aiohttp import web

from tests.support.server import Serving


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


class Hub(Serving):
    """What is pushed stays in `repos` and `stored`; `asked` lists the requests."""

    def __init__(self, token: str | None = "hf_test") -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        super().__init__()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.root, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._guard])
        repo = "/api/datasets/{owner}/{name}"
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate)
        app.router.add_get(repo, self._info)
        app.router.add_get(repo + "/revision/{revision:.+}", self._info)
        app.router.add_get(repo + "/tree/{revision}", self._tree)
        app.router.add_get(repo + "/tree/{revision}/{path:.+}", self._tree)
        app.router.add_post(repo + "/paths-info/{revision}", self._paths)
        app.router.add_post(repo + "/branch/{revision}", self._branch)
        app.router.add_post(repo + "/preupload/{revision}", self._preupload)
        app.router.add_post(repo + "/commit/{revision}", self._commit)
        app.router.add_post("/datasets/{owner}/{name}.git/info/lfs/objects/batch", self._batch)
        app.router.add_put("/store/{oid}", self._store)
        app.router.add_get("/datasets/{owner}/{name}/resolve/{revision}/{path:.+}", self._resolve)
        model = "/api/models/{owner}/{name}"
        app.router.add_get(model, self._info)
        app.router.add_get(model + "/revision/{revision:.+}", self._info)
        app.router.add_get(model + "/tree/{revision}", self._tree)
        app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.+}", self._resolve)
        await self._listen(app)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        key = request.headers.get("Authorization")
        self.asked.append((request.method, request.path, key))
        stored = request.path.startswith("/store/")  # its address is the permission
        if self.token and key != f"Bearer {self.token}" and not stored:
            return _refusal(401, "RepoNotFound", "Invalid username or password.")
        return await handler(request)

    def _repo(self, request: web.Request) -> tuple[str, Repo]:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name not in self.repos:
            raise _missing("RepoNotFound", "Repository not found")
        return name, self.repos[name]

    def _tree_of(self, request: web.Request, repo: Repo) -> dict[str, bytes]:
        revision = request.match_info.get("revision", "main")
        if revision in repo.branches:
            return repo.branches[revision]
        if revision in repo.commits:
            return repo.branches["main"]
        raise _missing("RevisionNotFound", "Invalid rev id")

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repos:
            return web.json_response({"url": f"{self.root}/datasets/{name}"}, status=409)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.repos[name] = Repo(private, commits=["0" * 40])
        return web.json_response({"url": f"{self.root}/datasets/{name}", "id": name})

    async def _validate(self, _: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def _info(self, request: web.Request) -> web.Response:
        name, repo = self._repo(request)
        tree = self._tree_of(request, repo)
        return web.json_response(
            {
                "id": name,
                "sha": repo.commits[-1],
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in tree],
            }
        )

    async def _tree(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        tree, below = self._tree_of(request, repo), request.match_info.get("path", "")
        inside = {p: data for p, data in tree.items() if not below or p.startswith(f"{below}/")}
        if below and not inside:
            raise _missing("EntryNotFound", "Entry not found")
        whole = request.query.get("recursive", "").lower() in ("true", "1")
        depth = below.count("/") + 1 if below else 0
        found = [_entry(p, d) for p, d in inside.items() if whole or p.count("/") == depth]
        return web.json_response([*found, *map(_folder, _folders(inside, depth, whole))])

    async def _paths(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        tree = self._tree_of(request, repo)
        form = await request.post()
        wanted = form.getall("paths", [])
        if not wanted and request.can_read_body:
            wanted = (await request.json()).get("paths", [])
        folders = _folders(tree, 0, True)
        found = [_entry(str(p), tree[str(p)]) for p in wanted if p in tree]
        return web.json_response([*found, *(_folder(str(p)) for p in wanted if p in folders)])

    async def _branch(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        revision = request.match_info["revision"]
        if revision in repo.branches:
            return web.json_response({"error": "Reference already exists"}, status=409)
        repo.branches[revision] = dict(repo.branches["main"])
        return web.json_response({})

    async def _preupload(self, request: web.Request) -> web.Response:
        asked = await request.json()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        return web.json_response({"files": files})

    async def _batch(self, request: web.Request) -> web.Response:
        asked = await request.json()
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.root}/store/{wanted['oid']}"}},
            }
            for wanted in asked["objects"]
        ]
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _store(self, request: web.Request) -> web.Response:
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.stored[request.match_info["oid"]] = data
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        name, repo = self._repo(request)
        tree = self._tree_of(request, repo)
        for line in (await request.text()).splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.stored[value["oid"]]
            elif key == "deletedFile":
                tree.pop(value["path"], None)
        commit = hashlib.sha1(str(len(repo.commits)).encode()).hexdigest()
        repo.commits.append(commit)
        url = f"{self.root}/datasets/{name}/commit/{commit}"
        return web.json_response({"success": True, "commitOid": commit, "commitUrl": url})

    async def _resolve(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        data = self._tree_of(request, repo).get(request.match_info["path"])
        if data is None:
            raise _missing("EntryNotFound", "Entry not found")
        headers = {
            "X-Repo-Commit": repo.commits[-1],
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        return web.Response(body=data, headers=headers)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid[:40]}


def _folders(paths: Iterable[str], depth: int, whole: bool) -> list[str]:
    """The folders that are `depth` deep, or also those below."""
    parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}
    return sorted(p for p in parents if p.count("/") == depth or (whole and p.count("/") > depth))


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _refusal(status: int, code: str, message: str) -> web.Response:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return web.json_response({"error": message}, status=status, headers=headers)


def _missing(code: str, message: str) -> web.HTTPNotFound:
    return web.HTTPNotFound(
        headers={"X-Error-Code": code, "X-Error-Message": message},
        text=json.dumps({"error": message}),
        content_type="application/json",
    )
