"""Train a LoRA over ComfyUI's HTTP API: submit, follow, fetch the file. Ctrl-C cancels; the same command goes on.

    python train_over_api.py --set VideoLoRADatasetFolder.folder=anna VideoLoRATrain.name=anna VideoLoRATrain.steps=1500

Needs nothing but Python. See api.md beside it.
"""

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows" / "api"


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--server", default="http://127.0.0.1:8188")
    options.add_argument("--workflow", type=Path, default=WORKFLOWS / "wan_t2v_train_loraid.json", help="in API form")
    options.add_argument(
        "--set", nargs="*", default=[], metavar="NODE.INPUT=VALUE", help="inputs to change, by node class"
    )
    options.add_argument("--to", type=Path, default=Path(), help="folder for the LoRA")
    chosen = options.parse_args()
    server = Server(chosen.server)
    graph = changed(json.loads(chosen.workflow.read_text(encoding="utf-8")), chosen.set)
    prompt = server.submit(graph)
    try:
        result = follow(server, prompt, {node["inputs"].get("name") for node in graph.values()})
    except KeyboardInterrupt:
        server.post("/interrupt", {"prompt_id": prompt})
        print("\ncancelled: it is saved, and the same command goes on")
        return 130
    for lora in (
        lora for output in result.values() for run in output.get("videolora_run", []) for lora in run["loras"]
    ):
        target = chosen.to / lora["filename"]
        target.write_bytes(server.get("/view?" + urllib.parse.urlencode(lora)))
        print(f"fetched {target}")
    return 0


class Server:
    """ComfyUI's HTTP API."""

    def __init__(self, url):
        self.url = url.rstrip("/")

    def get(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read()

    def post(self, path, value):
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"ComfyUI refused: {error.read().decode()}") from None

    def submit(self, graph):
        """Queue a workflow; its prompt id."""
        return json.loads(self.post("/prompt", {"prompt": graph}))["prompt_id"]

    def ended(self, prompt):
        """What a prompt left in the history, or None while it is at work."""
        return json.loads(self.get(f"/history/{prompt}")).get(prompt)

    def running(self):
        """The trainings that are at work."""
        runs = json.loads(self.get("/videolora/runs"))["runs"]
        return [run for run in runs if run["status"]["state"] in ("running", "paused")]


def changed(graph, settings):
    """The workflow with other values, each given as class.input=value."""
    for setting in settings:
        place, _, value = setting.partition("=")
        kind, _, name = place.partition(".")
        nodes = [node for node in graph.values() if node["class_type"] == kind and name in node["inputs"]]
        if not nodes:
            raise SystemExit(f"{place} is in no node of this workflow.")
        for node in nodes:
            node["inputs"][name] = value if isinstance(node["inputs"][name], str) else json.loads(value)
    return graph


def follow(server, prompt, names):
    """Print what the trainings of these names do until the prompt ends; what its nodes put out."""
    shown = {}
    while (end := server.ended(prompt)) is None:
        for run in server.running():
            step = run["status"]["step"]
            if run["name"] in names and shown.get(run["name"]) != step:
                shown[run["name"]] = step
                print(f"{run['name']}: step {step} of {run['steps']}", flush=True)
        time.sleep(1)
    if end["status"]["status_str"] != "success":
        errors = [data["exception_message"] for kind, data in end["status"]["messages"] if kind == "execution_error"]
        raise SystemExit("\n".join(errors) or "it was cancelled: queue it again to go on")
    return end["outputs"]


if __name__ == "__main__":
    raise SystemExit(main())
