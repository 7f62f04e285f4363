"""HTTP routes to watch and control trainings, for the editor and for API clients; the same below /api.

GET  /videolora/runs                 all runs, the latest first
GET  /videolora/runs/{id}?tail=100   one run: status, its last steps, previews, notes
POST /videolora/runs/{id}/stop       save and stop after the running step; queue the training again to go on
POST /videolora/runs/{id}/save       save now and go on
POST /videolora/runs/{id}/pause      save and wait after the running step
POST /videolora/runs/{id}/resume     go on
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..core.training.run import PAUSE, SAVE, STOP, MetricsReader, Run
from . import paths

_MOST_STEPS = 10000
_COMMANDS: dict[str, Callable[[Run], None]] = {
    "stop": lambda run: run.ask(STOP),
    "save": lambda run: run.ask(SAVE),
    "pause": lambda run: run.ask(PAUSE),
    "resume": lambda run: run.forget(PAUSE),
}


def add_routes() -> None:
    """Register the routes with ComfyUI's server, when there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    server.routes.get("/videolora/runs")(_list)
    server.routes.get("/videolora/runs/{id}")(_show)
    server.routes.post("/videolora/runs/{id}/{command}")(_control)


async def _list(request: web.Request) -> web.Response:
    runs = await asyncio.to_thread(lambda: [_described(run) for run in Run.all(paths.runs_folder())])
    return web.json_response({"runs": runs})


async def _show(request: web.Request) -> web.Response:
    tail = request.query.get("tail", "100")
    if not tail.isascii() or not tail.isdigit() or not 0 <= int(tail) <= _MOST_STEPS:
        raise web.HTTPBadRequest(text=f"tail is '{tail}': use 0 to {_MOST_STEPS}.")
    run = _found(request)
    return web.json_response(await asyncio.to_thread(_details, run, int(tail)))


async def _control(request: web.Request) -> web.Response:
    run, command = _found(request), request.match_info["command"]
    if command not in _COMMANDS:
        raise web.HTTPNotFound(text=f"'{command}' is unknown: use {', '.join(_COMMANDS)}.")
    if not run.is_alive():
        raise web.HTTPConflict(text="this run is not at work: queue its training again to go on.")
    _COMMANDS[command](run)
    return web.json_response(_described(run))


def _found(request: web.Request) -> Run:
    try:
        return Run.find(paths.runs_folder(), request.match_info["id"])
    except ValueError as error:
        raise web.HTTPNotFound(text=str(error)) from error


def _described(run: Run) -> dict[str, Any]:
    try:
        job = run.job()
    except ValueError as error:  # of another version of this pack
        return {"id": run.folder.name, "error": str(error), "status": run.status()}
    return {"id": run.folder.name, "name": job.name, "steps": job.steps, "status": run.status()}


def _details(run: Run, tail: int) -> dict[str, Any]:
    steps = list(MetricsReader(run, keep=tail).read())
    previews = [paths.shown(path) for path in run.previews()]
    return {**_described(run), "metrics": steps, "previews": previews, "notes": run.notes()}
