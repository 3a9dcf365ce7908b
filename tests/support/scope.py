"""ModelScope's hub over real sockets: what its client asks of one to push a dataset.

Written from the behaviour of modelscope-hub's client: create, look for, LFS batch, upload, commit,
download. It keeps the files in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from aiohttp import web

from tests.support.server import Serving

TOKEN = "ms-test-token"


class Scope(Serving):
    """What is pushed stays in `files`, by dataset; `created` is what each was created with."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, str]] = {}
        self.stored: dict[str, bytes] = {}
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        return {"MODELSCOPE_ENDPOINT": self.root, "MODELSCOPE_API_TOKEN": TOKEN}

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._guard])
        repo = "datasets/{owner}/{name}"
        app.router.add_post("/api/v1/datasets", self._create)
        app.router.add_get(f"/api/v1/{repo}", self._info)
        app.router.add_get(f"/api/v1/{repo}/repo", self._download)
        app.router.add_post(f"/api/v1/repos/{repo}/info/lfs/objects/batch", self._batch)
        app.router.add_put("/store/{oid}", self._store)
        app.router.add_post(f"/api/v1/repos/{repo}/commit/master", self._commit)
        await self._listen(app)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refusal(401, 10010103009, "the access token is invalid")
        return await handler(request)

    def _tree(self, request: web.Request) -> dict[str, bytes]:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name not in self.files:
            raise web.HTTPNotFound(
                text=json.dumps({"Code": 404, "Success": False, "Message": "not found"}),
                content_type="application/json",
            )
        return self.files[name]

    async def _create(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        name = f"{form['Owner']}/{form['Name']}"
        if name in self.files:
            return _refusal(400, 10020101001, "the dataset already exists")
        self.files[name], self.created[name] = {}, form
        return _answer({"Id": 1, "Name": form["Name"]})

    async def _info(self, request: web.Request) -> web.Response:
        self._tree(request)
        return _answer({"Id": 1, "Name": request.match_info["name"]})

    async def _download(self, request: web.Request) -> web.Response:
        data = self._tree(request).get(request.query["FilePath"])
        if data is None:
            return _refusal(404, 404, "no such file")
        return web.Response(body=data)

    async def _batch(self, request: web.Request) -> web.Response:
        objects = [
            {"oid": o["oid"], "actions": {"upload": {"href": f"{self.root}/store/{o['oid']}"}}}
            for o in (await request.json())["objects"]
        ]
        return _answer({"objects": objects})

    async def _store(self, request: web.Request) -> web.Response:
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.stored[request.match_info["oid"]] = data
        return _answer({})

    async def _commit(self, request: web.Request) -> web.Response:
        tree = self._tree(request)
        for action in (await request.json())["actions"]:
            lfs = action["type"] == "lfs"
            tree[action["path"]] = (
                self.stored[action["sha256"]] if lfs else base64.b64decode(action["content"])
            )
        return _answer({"oid": "1"})


def _answer(data: Any) -> web.Response:
    return web.json_response({"Code": 200, "Success": True, "Data": data})


def _refusal(status: int, code: int, message: str) -> web.Response:
    body = {"Code": code, "Success": False, "Message": message}
    return web.json_response(body, status=status)
