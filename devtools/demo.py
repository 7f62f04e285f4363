"""The whole way on small models: clips -> caches -> two LORAIDs -> one video with both -> a merged checkpoint.

python devtools/demo.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import av
import client
import clips
import server
from PIL import Image, ImageDraw

WORKFLOWS = server.ROOT / "workflows" / "api"
SIZE = {"width": 96, "height": 64}
FRAMES = 13
# What the shipped workflows ask of a real model is too much for small ones on a CPU.
SMALL = {
    "VideoLoRADatasetFolder": {**SIZE, "frames": str(FRAMES)},
    "VideoLoRAOptimizerSettings": {"learning_rate": 2e-3},
    "VideoLoRASelectLORAID": {"unit": "row", "units_per_id": 120},
    "VideoLoRASaveSettings": {"every_steps": 0},
    "VideoLoRATrain": {"steps": 160},
    "VideoLoRAEmptyLatent": {**SIZE, "frames": FRAMES},
    "VideoLoRALoadFrames": {**SIZE, "frames": FRAMES},
    "VideoLoRAEncodeImage": {**SIZE, "frames": FRAMES},
    "VideoLoRAFlowSchedule": {"steps": 20, "shift": 3.0},
    "VideoLoRASample": {"guidance": 3.0},
}
CLIPS_PER_CHARACTER = 6
PROMPTS = {
    "character_1": ("zarko", "zarko, a red disk, swings from side to side over a dark blue background"),
    "character_2": ("mivel", "mivel, a green square, moves diagonally and turns over a dark grey background"),
}
BOTH = "zarko, a red disk, and mivel, a green square, over a dark blue background"
NEGATIVE = ""


def prepare_data(base: Path) -> None:
    """The two characters' clips, and pictures, in ComfyUI's input folder."""
    pictures = base / "input" / "pictures_1"
    pictures.mkdir(parents=True, exist_ok=True)
    for seed in range(4):
        frames, caption = clips.render_generic(seed, 1)
        Image.fromarray(frames[0]).save(pictures / f"{seed}.png")
        (pictures / f"{seed}.txt").write_text(caption)
    for seed, name in enumerate(("start_image", "end_image")):
        Image.fromarray(clips.render_generic(seed, 1)[0][0]).save(base / "input" / f"{name}.png")
    clips.write_video(base / "input" / "video.mp4", clips.render_generic(2, FRAMES + 2)[0], fps=16)
    for folder, (character, _) in PROMPTS.items():
        target = base / "input" / folder
        if not target.is_dir():
            clips.render_clips(target, character, CLIPS_PER_CHARACTER, frames=FRAMES + 8)


def graph(name: str, **overrides: dict) -> dict:
    """A shipped workflow at the size of the small models."""
    shipped = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    changed = client.with_overrides(shipped, SMALL)
    for kind, values in overrides.items():
        changed = client.with_overrides(changed, {kind: values})
    for node in changed.values():
        if node["_meta"]["title"] == "Negative prompt":
            node["inputs"]["prompt"] = NEGATIVE
    return changed


def training_graph(folder: str, loraid: int) -> dict:
    changed = graph(
        "wan_t2v_train_loraid",
        VideoLoRADatasetFolder={"folder": folder},
        VideoLoRATrain={"name": folder},
        SaveVideo={"filename_prefix": f"video/{folder}"},
    )
    for node in changed.values():
        if node["class_type"] == "VideoLoRASelectLORAID":
            node["inputs"]["loraid"] = loraid
        elif node["_meta"]["title"] == "Prompt":
            node["inputs"]["prompt"] = PROMPTS[folder][1]
    return changed


def sampling_graph() -> dict:
    changed = graph("wan_t2v_two_loraids")
    for node in changed.values():
        if node["_meta"]["title"] == "Prompt":
            node["inputs"]["prompt"] = BOTH
    return changed


class Bar:
    """A progress bar for one prompt."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.live = sys.stdout.isatty()

    def __call__(self, kind: str, done: int, total: int) -> None:
        if self.live:
            filled = int(30 * done / max(total, 1))
            print(
                f"\r{self.title:24} {kind.removeprefix('VideoLoRA'):16} [{'#' * filled:30}] {done}/{total}   ",
                end="",
                flush=True,
            )

    def close(self, seconds: float) -> None:
        print(f"\r{self.title:24} done in {seconds:.0f} s" + " " * 60 * self.live, flush=True)


def submit(running: server.Server, title: str, prompt: dict) -> tuple[client.Outcome, dict]:
    bar, begin = Bar(title), time.monotonic()
    outcome = client.run(running, prompt, bar)
    if outcome.error or outcome.interrupted:
        raise SystemExit(f"\n{title} failed: {outcome.error or 'interrupted'}\nSee {running.log}")
    bar.close(time.monotonic() - begin)
    return outcome, prompt


def shown(outcome: client.Outcome, key: str) -> dict:
    """What a node showed under a name of its own."""
    return next(output[key][0] for output in outcome.outputs.values() if key in output)


def saved_video(running: server.Server, outcome: client.Outcome) -> Path:
    entry = next(output["images"][0] for output in outcome.outputs.values() if "images" in output)
    return running.base / entry.get("type", "output") / entry["subfolder"] / entry["filename"]


def contact_sheet(videos: dict[str, Path], target: Path, columns: int = 7, scale: int = 2) -> None:
    """Frames of each video in a row, with its title."""
    rows = []
    for title, path in videos.items():
        with av.open(str(path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        picked = [frames[index * (len(frames) - 1) // (columns - 1)] for index in range(columns)]
        rows.append((title, [frame.resize((frame.width * scale, frame.height * scale)) for frame in picked]))
    width, height = rows[0][1][0].size
    sheet = Image.new("RGB", (width * columns, (height + 16) * len(rows)), "white")
    for row, (title, frames) in enumerate(rows):
        top = row * (height + 16)
        ImageDraw.Draw(sheet).text((4, top + 2), title, fill="black")
        for column, frame in enumerate(frames):
            sheet.paste(frame, (column * width, top + 16))
    sheet.save(target)


def seconds_of(outcome: client.Outcome, prompt: dict, kind: str) -> float:
    return sum(seconds for node, seconds in outcome.seconds.items() if prompt[node]["class_type"] == kind)


def main() -> None:
    stages: dict[str, float] = {}

    def stage(name: str, begin: float) -> None:
        stages[name] = time.monotonic() - begin

    begin = time.monotonic()
    base = server.prepare()
    prepare_data(base)
    stage("small models and clips", begin)
    begin = time.monotonic()
    with server.running(base) as running:
        stage("ComfyUI starts", begin)
        trained = {
            folder: submit(running, f"train LORAID {loraid}", training_graph(folder, loraid))
            for loraid, folder in enumerate(PROMPTS, start=1)
        }
        both, both_graph = submit(running, "sample with both", sampling_graph())
        merged, merge_graph = submit(running, "merge", graph("wan_t2v_merge"))
        videos = {
            f"{folder}: {PROMPTS[folder][1]}": saved_video(running, outcome) for folder, (outcome, _) in trained.items()
        }
        videos[f"both: {BOTH}"] = saved_video(running, both)
    sheet = base / "output" / "contact_sheet.png"
    contact_sheet(videos, sheet)
    everything = [*trained.values(), (both, both_graph), (merged, merge_graph)]
    for title, kinds in {
        "cache latents": ["VideoLoRACacheLatents"],
        "cache captions": ["VideoLoRACacheText"],
        "train": ["VideoLoRATrain"],
        "sample": ["VideoLoRASample", "VideoLoRADecode"],
        "merge": ["VideoLoRAMergeLoRA"],
    }.items():
        stages[title] = sum(seconds_of(outcome, prompt, kind) for outcome, prompt in everything for kind in kinds)
    report(trained, both, merged, videos, sheet, stages)


def report(
    trained: dict, both: client.Outcome, merged: client.Outcome, videos: dict, sheet: Path, stages: dict
) -> None:
    print("\nwhat was cached")
    for folder, (outcome, prompt) in trained.items():
        for node, text in outcome.texts.items():
            if prompt[node]["class_type"] in ("VideoLoRACacheLatents", "VideoLoRACacheText"):
                print(f"  {folder}: {text.splitlines()[0]}")
    print("\nLORAID  steps  loss at start  loss at end  s/step  file")
    for outcome, _ in trained.values():
        run = shown(outcome, "videolora_run")
        print(f"{run['loraid']:6}  {run['steps']:5}  {run['loss_start']:13.4f}  {run['loss_end']:11.4f}  "
              f"{run['seconds'] / run['steps']:6.3f}  {run['files'][-1]}")  # fmt: skip
    print("\nwritten")
    for title, path in videos.items():
        print(f"  {path}  ({title.split(':')[0]})")
    print(f"  {shown(merged, 'videolora_merge')['path']}")
    print(f"  {sheet}  (contact sheet)")
    print("\nseconds")
    for name, seconds in stages.items():
        print(f"  {name:24} {seconds:6.1f}")


if __name__ == "__main__":
    begin = time.monotonic()
    main()
    print(f"  {'all':24} {time.monotonic() - begin:6.1f}")
