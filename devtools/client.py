"""Submitting workflows to ComfyUI's HTTP API and following them over its websocket."""

from __future__ import annotations

import asyncio
import copy
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from server import Server

Overrides = Mapping[str, Mapping[str, Any]]
"""Node class or node id -> input -> value."""


@dataclass
class Outcome:
    """How a prompt ended: `outputs` (node id -> what it showed), `error` (empty when it succeeded), `seconds` per node."""

    prompt_id: str
    outputs: dict[str, dict] = field(default_factory=dict)
    error: str = ""
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Rejected(ValueError):
    """ComfyUI refused the prompt; the message holds what it said of each node."""


def with_overrides(graph: Mapping[str, dict], overrides: Overrides) -> dict[str, dict]:
    """A copy of an API-format graph with other input values."""
    changed = copy.deepcopy(dict(graph))
    for node_id, node in changed.items():
        node["inputs"] |= overrides.get(node["class_type"], {})
        node["inputs"] |= overrides.get(node_id, {})
    return changed


def run(server: Server, graph: dict, follow: Callable[[str, int, int], None] = lambda *_: None,
        on_start: Callable[[str], None] = lambda _: None) -> Outcome:  # fmt: skip
    """Submit a graph and wait for its end. `follow` gets (node class, done, total) as work goes on.

    Raises Rejected when validation fails.
    """
    return asyncio.run(_run(server, graph, follow, on_start))


async def _run(server: Server, graph: dict, follow: Callable, on_start: Callable) -> Outcome:
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        status, answer = await asyncio.to_thread(server.post, "/prompt", {"prompt": graph, "client_id": client})
        if status != 200 or answer.get("node_errors"):
            raise Rejected(describe_rejection(answer))
        outcome = Outcome(answer["prompt_id"])
        on_start(outcome.prompt_id)
        current, since = None, time.monotonic()
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                _take_binary(message.data, outcome)
                continue
            event = json.loads(message.data)
            data = event["data"]
            if data.get("prompt_id", outcome.prompt_id) != outcome.prompt_id:
                continue
            if event["type"] == "executing":
                if current is not None:
                    outcome.seconds[current] = outcome.seconds.get(current, 0.0) + time.monotonic() - since
                current, since = data["node"], time.monotonic()
                if current is not None:
                    follow(graph[current]["class_type"], 0, 1)
            elif event["type"] == "progress" and current is not None:
                follow(graph[current]["class_type"], data["value"], data["max"])
            elif event["type"] == "executed":
                outcome.outputs[data["node"]] = data["output"] or {}
            elif event["type"] == "execution_error":
                outcome.error = data["exception_message"]
                return outcome
            elif event["type"] == "execution_interrupted":
                outcome.interrupted = True
                return outcome
            elif event["type"] == "execution_success":
                return outcome
    raise ConnectionError("ComfyUI closed the connection before the prompt ended")


_TEXT_EVENT = 3


def _take_binary(data: bytes, outcome: Outcome) -> None:
    """Texts that nodes show under themselves: event, length of the node's id, id, text."""
    if int.from_bytes(data[:4], "big") == _TEXT_EVENT:
        length = int.from_bytes(data[4:8], "big")
        outcome.texts[data[8 : 8 + length].decode()] = data[8 + length :].decode()


def describe_rejection(answer: dict) -> str:
    lines = [answer.get("error", {}).get("message", "")]
    for node_id, node in answer.get("node_errors", {}).items():
        lines += [
            f"{node['class_type']} ({node_id}): {error['message']}: {error['details']}" for error in node["errors"]
        ]
    return "\n".join(filter(None, lines))
