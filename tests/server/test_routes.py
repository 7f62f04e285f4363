"""The routes of the editor's panels on a real server: what they answer, and what they refuse."""

import http.client
import json
import os
import signal
import time
from urllib.parse import urlsplit

import pytest
import server as servers
from videolora.core.families import FAMILIES, open_part
from videolora.core.io.safetensors import read_header
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.sampling.schedule import Schedule

import workflows

from .conftest import node, summary, training

MODEL = {"model": workflows.DIT}
ROUTES = [
    ("GET", "/videolora/runs"), ("GET", "/videolora/runs/some"), ("GET", "/videolora/runs/some/steps"),
    ("POST", "/videolora/runs/some/stop"), ("POST", "/videolora/schedule"), ("POST", "/videolora/map"),
    ("POST", "/videolora/dropped?name=a.safetensors"),
]  # fmt: skip


def ask(server, method, path, body=b"{}", **headers):
    """Status and text of an answer."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request(method, path, body if method == "POST" else None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def run(trained):
    """The name of a finished run."""
    return summary(trained["character_1"])["run"].replace("\\", "/").split("/")[-1]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"},
                                     {"Origin": "https://evil.example", "Host": "studio.example"}, {"Origin": "null"}])  # fmt: skip
def test_pages_of_other_origins_are_refused(server, method, path, headers):
    assert ask(server, method, path, **headers)[0] == 403
    assert ask(server, method, f"/api{path}", **headers)[0] == 403


def test_the_editor_itself_and_programs_are_answered(server):
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": server.url}):
        assert ask(server, "GET", "/videolora/runs", **headers)[0] == 200


@pytest.mark.parametrize("name", ["gone", "..%2f..%2fetc", "%2e%2e", "..%5c..", "C:%5cWindows"])
@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("GET", "/steps"), ("POST", "/stop"), ("POST", "/pause")])
def test_runs_that_are_not_there_and_paths_that_lead_out_are_not_found(server, run, method, name, rest):
    assert ask(server, method, f"/videolora/runs/{name}{rest}")[0] == 404


def test_a_run_takes_known_commands_while_it_is_at_work(server, run):
    status, text = ask(server, "POST", f"/videolora/runs/{run}/explode")
    assert status == 404 and "stop, save, pause, resume" in text
    status, text = ask(server, "POST", f"/videolora/runs/{run}/pause")
    assert status == 409 and "queue its training again" in text
    assert not (server.base / "output" / "videolora" / "runs" / run / "pause").exists()


def test_what_is_too_long_is_refused(server, run):
    assert ask(server, "GET", f"/videolora/runs/{'a' * 201}")[0] == 400
    assert ask(server, "GET", f"/videolora/runs/{run}/steps?after={'1' * 201}")[0] == 400
    assert ask(server, "GET", f"/videolora/runs/{run}?tail=10001")[0] == 400
    for path in ("schedule", "map"):
        long = json.dumps({**MODEL, "more": "a" * (1 << 16)}).encode()
        assert ask(server, "POST", f"/videolora/{path}", long)[0] == 413
    status, text = ask(server, "POST", "/videolora/map", json.dumps({**MODEL, "loras": [{"file": "a"}] * 17}).encode())
    assert status == 400 and "at most 16" in text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "../../secret.safetensors"}', b'{"model": 3}', b"{}"])
@pytest.mark.parametrize("path", ["schedule", "map"])
def test_a_question_that_cannot_be_answered_is_refused(server, path, body):
    assert ask(server, "POST", f"/videolora/{path}", body)[0] == 400


@pytest.mark.parametrize(
    "wrong",
    ['"steps": 5, "size": [1, 2]', '"steps": 5, "size": 7', '"steps": 5, "boundary": NaN', '"steps": 5, "shift": Infinity',
     '"steps": 5, "cfg_ratio": NaN', '"steps": 5, "cfg_skip": "never"', '"steps": 5, "variant": "none"', '"steps": 5, "expert": "third"',
     '"loras": "all"', '"loras": [3]', "[" * 60000],
)  # fmt: skip
def test_odd_values_are_a_clear_refusal(server, wrong):
    path = "map" if "loras" in wrong else "schedule"
    status, text = ask(server, "POST", f"/videolora/{path}", f'{{"model": "{workflows.DIT}", {wrong}}}'.encode())
    assert status == 400 and text


def test_steps_are_read_on_from_where_the_last_answer_ended(server, run):
    first = server.get(f"/videolora/runs/{run}/steps")
    assert first["anew"] and first["columns"]["step"] == list(range(1, 13)) and first["status"]["state"] == "finished"
    assert all(len(column) == 12 for column in first["columns"].values())
    whole = server.get(f"/videolora/runs/{run}?tail=12")["metrics"]
    assert first["columns"]["loss"] == pytest.approx([entry["loss"] for entry in whole], rel=1e-5)
    assert first["columns"]["samples"][0] == [
        [int(whole[0]["timesteps"][0] // 100), pytest.approx(whole[0]["losses"][0], rel=1e-5)]
    ]
    again = server.get(f"/videolora/runs/{run}/steps?after={first['cursor']}")
    assert not again["anew"] and again["columns"]["step"] == [] and again["cursor"] == first["cursor"]
    for cursor in ("nonsense", "0.0:50", "1:-3"):  # of a process that is no more, or of none
        assert server.get(f"/videolora/runs/{run}/steps?after={cursor}")["columns"]["step"] == list(range(1, 13))


def test_the_list_says_what_each_run_was_set_to_and_where_it_came_from(server, trained, run):
    listed = {one["id"]: one for one in server.get("/videolora/runs")["runs"]}
    assert listed[run]["origin"] == {"workflow": "", "node": node(training("character_1", 1), "VideoLoRATrain")}
    settings = listed[run]["settings"]
    assert settings["steps"] == 12 and settings["loraid.number"] == 1 and settings["optimizer.learning_rate"] == 2e-3


def test_the_schedule_is_that_of_the_node(server):
    _, answer = server.post(
        "/videolora/schedule",
        {**MODEL, "steps": 10, "shift": 3.0, "solver": "unipc", "cfg_skip": "late", "cfg_ratio": 0.4},
    )
    assert answer["sigmas"] == pytest.approx(Schedule(steps=10, shift=3.0, solver="unipc").sigmas.tolist(), abs=1e-5)
    assert answer["plan"] == "AAAASSSSSS"
    _, answer = server.post("/videolora/schedule", {**MODEL, "steps": 10, "shift": 0.0, "solver": "euler"})
    assert answer["shift"] == 5.0 and answer["recommended"] and answer["plan"] == "A" * 10
    for wrong in (
        {"steps": 0},
        {"steps": 10**9},
        {"steps": "ten"},
        {"steps": 5, "solver": "none"},
        {"steps": 5, "shift": -1},
    ):
        assert ask(server, "POST", "/videolora/schedule", json.dumps({**MODEL, **wrong}).encode())[0] == 400


def test_the_map_is_the_allocation(server):
    path = server.base / "models" / "diffusion_models" / workflows.DIT
    checkpoint, part = open_part(path, "dit")
    matrices = inventory(FAMILIES[part.family], checkpoint.shapes(part.keymap))
    for unit, units_per_id in (("slot", 12), ("block", 1), ("row", 120)):
        share = allocate(matrices, Loraid(number=2, unit=unit, units_per_id=units_per_id))
        _, answer = server.post(
            "/videolora/map", {**MODEL, "loraid": {"number": 2, "unit": unit, "units_per_id": units_per_id}}
        )
        names = [f"{answer['blocks'][block]}.{answer['kinds'][kind]}" for block, kind, *_ in answer["matrices"]]
        assert names == [matrix.name for matrix in matrices]
        assert {names[index]: (start, stop) for index, start, stop in answer["own"]["rows"]} == share.rows
        assert answer["own"]["parameters"] == share.parameters
    _, answer = server.post("/videolora/map", {**MODEL, "loraid": {"number": 999, "unit": "slot", "units_per_id": 12}})
    assert "LORAID 999 is out of range" in answer["own"]["error"]


def test_the_map_shows_who_owns_what_and_where_two_collide(server, trained):
    files = [{"file": f"{name}.safetensors"} for name in trained]
    asked = {**MODEL, "loraid": {"number": 1, "unit": "row", "units_per_id": 120}}
    _, answer = server.post("/videolora/map", {**asked, "loras": files})
    assert [lora["loraid"] for lora in answer["loras"]] == [1, 2]
    assert [one["between"] for one in answer["shared"]] == [["own", 0]], (
        "LORAID 1 is what the first file was trained with"
    )
    assert answer["shared"][0]["parameters"] == answer["own"]["parameters"] == answer["loras"][0]["parameters"]
    _, answer = server.post(
        "/videolora/map",
        {**MODEL, "loras": [{"file": "gone.safetensors"}, {"file": "../../x"}, {"dropped": "../x"}]},
    )
    assert all(lora["error"] and "rows" not in lora for lora in answer["loras"]) and not answer["shared"]


def test_a_dropped_file_is_taken_in_when_it_is_a_whole_safetensors_file(server, trained):
    content = (server.base / "output" / "loras" / "character_1.safetensors").read_bytes()
    status, text = ask(server, "POST", "/videolora/dropped?name=dropped.safetensors", content)
    assert status == 200
    lora = {**json.loads(text), "name": "dropped.safetensors"}
    _, answer = server.post("/videolora/map", {**MODEL, "loras": [lora, {"file": "character_1.safetensors"}]})
    assert answer["loras"][0]["name"] == "dropped.safetensors" and answer["loras"][0]["loraid"] == 1
    assert answer["shared"][0]["between"] == [0, 1]
    folder = server.base / "temp" / "videolora"
    kept = sorted(folder.glob("*.safetensors"))
    for name, body in (("a.safetensors", b"hello"), ("a.safetensors", content[:-9]), ("a.pt", content), ("..%2fa.safetensors", content),
                       ("a%5cb.safetensors", content), (f"{'a' * 180}.safetensors", content), ("", content)):  # fmt: skip
        assert ask(server, "POST", f"/videolora/dropped?name={name}", body)[0] == 400, name
    assert sorted(folder.glob("*.safetensors")) == kept and all(read_header(path) for path in kept)


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


def at_work(server, name, step):
    """The run of this name, when it is running and has reached the step."""
    for one in server.get("/videolora/runs")["runs"]:
        if one.get("name") == name and one["status"]["state"] == "running" and one["status"]["step"] >= step:
            return one
    return None


@pytest.fixture
def second(server, trained, tmp_path):
    """The base folder of another server, with the same models and clips."""
    base = tmp_path / "base"
    servers.link_pack(base)
    for folder in ("models", "input"):
        (base / folder).symlink_to(server.base / folder, target_is_directory=True)
    return base


def test_a_server_that_is_restarted_finds_the_training_again(second):
    """Its process goes on meanwhile, can be asked, and what became of it is told truly."""
    graph = training("character_1", 1, name="restarted", steps=3000)
    graph = {key: entry for key, entry in graph.items() if entry["class_type"] in TRAINING}
    with servers.running(second) as first:
        first.post("/prompt", {"prompt": graph})
        before = until(lambda: at_work(first, "restarted", 3))
    with servers.running(second) as again:
        found = until(lambda: at_work(again, "restarted", before["status"]["step"]))
        assert found["id"] == before["id"] and again.get("/queue") == {"queue_running": [], "queue_pending": []}
        follow = f"/videolora/runs/{found['id']}/steps"
        steps = again.get(follow)
        until(lambda: again.get(f"{follow}?after={steps['cursor']}")["columns"]["step"])
        assert again.post(f"/videolora/runs/{found['id']}/pause", {})[0] == 200
        until(lambda: again.get(follow)["status"]["state"] == "paused")
        worker = json.loads((second / "output" / "videolora" / "runs" / found["id"] / "worker.json").read_text())
        os.kill(worker["pid"], signal.SIGKILL)
        until(lambda: again.get(follow)["status"]["state"] == "stopped", 10)


TRAINING = {"VideoLoRALoadDiT", "VideoLoRALoadVAE", "VideoLoRALoadT5", "VideoLoRADatasetFolder", "VideoLoRACacheLatents",
            "VideoLoRACacheText", "VideoLoRASelectLORAID", "VideoLoRANetworkSettings", "VideoLoRAOptimizerSettings",
            "VideoLoRASaveSettings", "VideoLoRATrain"}  # fmt: skip
