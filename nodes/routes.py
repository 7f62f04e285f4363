"""HTTP routes, for the editor's panels and for API clients; the same below /api.

Trainings:

GET  /videolora/runs                     all runs, the latest first
GET  /videolora/runs/{id}?tail=100       one run: status, its last steps, previews, notes
GET  /videolora/runs/{id}/steps?after=   the steps since the last answer, whose `cursor` is given back as `after`; status and previews
POST /videolora/runs/{id}/stop           save and stop after the running step; queue the training again to go on
POST /videolora/runs/{id}/save           save now and go on
POST /videolora/runs/{id}/pause          save and wait after the running step
POST /videolora/runs/{id}/resume         go on

What nodes show while their values are changed, computed by what the nodes themselves run (see `sights.py`):

POST /videolora/schedule                 flow shift, sigmas and CFG skip's plan
POST /videolora/map                      what a LORAID and LoRA files own of a model
POST /videolora/dropped?name=            takes in a LoRA file for the map; what is answered stands for it there
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web
from comfy.cli_args import args
from server import PromptServer

from ..core.training.job import Job
from ..core.training.run import PAUSE, SAVE, STOP, MetricsReader, Run
from ..core.training.watching import band_of
from . import paths, sights, training

_MOST_STEPS = 10000
_LONGEST_BODY = 1 << 16
_LONGEST_WORD = 200  # of what stands in an address
_COMMANDS: dict[str, Callable[[Run], None]] = {
    "stop": lambda run: run.ask(STOP),
    "save": lambda run: run.ask(SAVE),
    "pause": lambda run: run.ask(PAUSE),
    "resume": lambda run: run.forget(PAUSE),
}
_SETTINGS = ("steps", "seed", "loraid", "network", "optimizer", "timesteps", "gpus", "variant")
Handler = Callable[[web.Request], Awaitable[web.Response]]


def add_routes() -> None:
    """Register the routes with ComfyUI's server, when there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for add, path, handler in (
        (server.routes.get, "/videolora/runs", _list),
        (server.routes.get, "/videolora/runs/{id}", _show),
        (server.routes.get, "/videolora/runs/{id}/steps", _steps),
        (server.routes.post, "/videolora/runs/{id}/{command}", _control),
        (server.routes.post, "/videolora/schedule", _answering(sights.schedule)),
        (server.routes.post, "/videolora/map", _answering(sights.ownership)),
        (server.routes.post, "/videolora/dropped", _take_in),
    ):
        add(path)(_guarded(handler))


def _guarded(handler: Handler) -> Handler:
    """Answers this page and programs, not the pages of other origins; ComfyUI's own check is for loopback addresses alone.
    Says what was wrong with a request that cannot be answered."""

    @functools.wraps(handler)
    async def guarded(request: web.Request) -> web.Response:
        if not args.enable_cors_header and _is_foreign(request):
            raise web.HTTPForbidden(text="requests from pages of other origins are refused.")
        words = [*request.match_info.values(), *request.query.values()]
        if any(len(word) > _LONGEST_WORD for word in words):
            raise web.HTTPBadRequest(text=f"the address is too long: its parts may have {_LONGEST_WORD} characters.")
        try:
            return await handler(request)
        except (ValueError, OSError) as error:
            raise web.HTTPBadRequest(text=str(error)) from error

    return guarded


def _is_foreign(request: web.Request) -> bool:
    """Whether a page of another origin sent it. Browsers say so themselves to addresses they trust, or name the origin."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    host = request.headers.get("X-Forwarded-Host") or request.headers.get("Host", "")
    return origin is not None and origin.partition("://")[2].lower() != host.lower()


async def _list(request: web.Request) -> web.Response:
    runs = await asyncio.to_thread(lambda: [_described(run) for run in Run.all(paths.runs_folder())])
    return web.json_response({"runs": runs})


async def _show(request: web.Request) -> web.Response:
    tail = request.query.get("tail", "100")
    if not tail.isascii() or not tail.isdigit() or not 0 <= int(tail) <= _MOST_STEPS:
        raise web.HTTPBadRequest(text=f"tail is '{tail}': use 0 to {_MOST_STEPS}.")
    run = _found(request)
    return web.json_response(await asyncio.to_thread(_details, run, int(tail)))


async def _steps(request: web.Request) -> web.Response:
    run = _found(request)
    return web.json_response(await asyncio.to_thread(_since, run, request.query.get("after", "")))


async def _control(request: web.Request) -> web.Response:
    run, command = _found(request), request.match_info["command"]
    if command not in _COMMANDS:
        raise web.HTTPNotFound(text=f"'{command}' is unknown: use {', '.join(_COMMANDS)}.")
    if not run.is_alive():
        raise web.HTTPConflict(text="this run is not at work: queue its training again to go on.")
    _COMMANDS[command](run)
    return web.json_response(_described(run))


async def _take_in(request: web.Request) -> web.Response:
    with sights.Dropped(request.query.get("name", "")) as dropped:
        async for chunk in request.content.iter_chunked(1 << 20):
            dropped.write(chunk)
    return web.json_response({"dropped": dropped.token})


def _answering(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Handler:
    """A handler that takes a JSON object and answers one."""

    async def handler(request: web.Request) -> web.Response:
        body = await request.content.read(_LONGEST_BODY + 1)
        if len(body) > _LONGEST_BODY:
            raise web.HTTPRequestEntityTooLarge(_LONGEST_BODY, len(body))
        try:
            wanted = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"this is no JSON: {error}.") from error
        if not isinstance(wanted, dict):
            raise ValueError("a JSON object is expected.")
        return web.json_response(await asyncio.to_thread(answer, wanted))

    return handler


def _found(request: web.Request) -> Run:
    try:
        return Run.find(paths.runs_folder(), request.match_info["id"])
    except ValueError as error:
        raise web.HTTPNotFound(text=str(error)) from error


def _described(run: Run) -> dict[str, Any]:
    """What stands in the list of runs; `settings` are what two runs of a name may differ in, `queued` is in seconds since 1970."""
    path = run.path("job.json")
    queued = path.stat().st_mtime
    status = run.status()
    if run.folder.name in training.starting and not run.is_alive():
        status = {"state": "starting", "step": status["step"]}
    found = {"id": run.folder.name, "status": status, "asked": run.asked(), "origin": run.origin(), "queued": queued}
    try:
        name, steps, settings = _job_of(run, queued)
    except ValueError as error:  # of another version of this pack
        return {**found, "error": str(error)}
    return {**found, "name": name, "steps": steps, "settings": settings}


@functools.lru_cache(512)
def _job_facts(path: str, _written: float) -> tuple[str, int, dict[str, Any]]:
    job = Run(paths.runs_folder() / path).job()
    return job.name, job.steps, _settings(job)


def _job_of(run: Run, written: float) -> tuple[str, int, dict[str, Any]]:
    return _job_facts(run.folder.name, written)


def _settings(job: Job) -> dict[str, Any]:
    """What a training was asked to do, flat: network.rank and the like."""
    values = asdict(job)
    flat: dict[str, Any] = {"clips": sum(len(dataset.items) for dataset in job.datasets)}
    for name in _SETTINGS:
        if isinstance(values[name], dict):
            flat |= {f"{name}.{key}": value for key, value in values[name].items() if not key.endswith("fingerprint")}
        elif values[name] is not None:
            flat[name] = values[name]
    return flat


def _details(run: Run, tail: int) -> dict[str, Any]:
    steps = list(MetricsReader(run, keep=tail).read())
    previews = [paths.shown(path) for path in run.previews()]
    return {**_described(run), "metrics": steps, "previews": previews, "notes": run.notes()}


def _since(run: Run, cursor: str) -> dict[str, Any]:
    """What has happened since `cursor`; `anew` when what was told before no longer holds, because steps are done again.

    The steps come as columns, with `samples` for the losses of each: [tenth of the timesteps, loss].
    """
    attempt, (known, _, position) = str(run.attempt()), cursor.partition(":")
    start = int(position) if known == attempt and position.isascii() and position.isdigit() else 0
    reader = MetricsReader(run, keep=None, position=start)
    entries = list(reader.read())
    anew = not start or reader.position < start
    columns: dict[str, list] = {
        "step": [entry["step"] for entry in entries],
        "loss": [_short(entry["loss"]) for entry in entries],
        "average": [_short(entry.get("loss_average")) for entry in entries],
        "rate": [_short(entry.get("effective_rate", entry["learning_rate"])) for entry in entries],
        "validation": [_short(entry.get("validation_loss")) for entry in entries],
        "samples": [
            [[band_of(timestep), _short(loss)] for timestep, loss in zip(entry["timesteps"], entry["losses"], strict=True)]
            for entry in entries
        ],
    }  # fmt: skip
    last = entries[-1] if entries else None
    now = last and {name: last[name] for name in ("epoch", "gradient_norm", "seconds", "seconds_left", "memory")}
    return {
        **_described(run), "cursor": f"{attempt}:{reader.position}", "anew": anew, "columns": columns, "now": now,
        "previews": _previews(run), "notes": run.notes()[-20:], "log": run.last_message(),
    }  # fmt: skip


def _previews(run: Run) -> list[dict[str, Any]]:
    """The videos and pictures of a run, each with its step and the number of its prompt."""
    found = []
    for path in run.previews():
        step, _, number = path.stem.removeprefix("step-").partition("_")
        found.append({**paths.shown(path), "step": int(step), "number": int(number)})
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
