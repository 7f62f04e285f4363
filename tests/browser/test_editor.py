"""The panels in a real browser, on a real server: what a person sees and touches."""

import base64
import json
import re
import time

import browser
import demo
import pytest
import torch
from playwright.sync_api import sync_playwright
from safetensors.torch import save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.files import save
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate

import workflows

READY = "() => window.app?.vueAppReady && document.querySelector('[data-testid=queue-button]')"
# ComfyUI's own page asks for files of the user that are not there yet, and reads its graph too early.
NOT_OURS = r"user\.css|/userdata|graph accessed before initialization|legacy queue/history|open_maskeditor|huggingface|api\.comfy\.org"
PIXELS = """selector => {
    const canvas = document.querySelector(selector);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    return [...new Set(new Uint32Array(data.buffer))];
}"""
RED = 0xFF4D48E5  # --vl-bad, as a canvas keeps it
PANEL = "document.querySelector('.vl-training')"


class Editor:
    """A page with ComfyUI's editor."""

    def __init__(self, context, url):
        self.page, self.complaints = context.new_page(), []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url, wait_until="domcontentloaded", timeout=120000)
        self.page.wait_for_function(READY, timeout=120000)

    def _heard(self, message):
        told = f"{message.text} {message.location.get('url', '')}"
        if message.type in ("error", "warning") and not re.search(NOT_OURS, told):
            self.complaints.append(told)

    def do(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def until(self, script, argument=None, seconds=40):
        return self.page.wait_for_function(script, arg=argument, timeout=1000 * seconds).json_value()

    def reload(self):
        self.page.reload(wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=120000)

    def use_vue_nodes(self, wanted):
        self.do("wanted => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', wanted)", wanted)

    def open(self, name, **values):
        """A shipped workflow with the values of small models; `values`: class of nodes -> widget -> value."""
        graph = json.loads((demo.WORKFLOWS.parent / f"{name}.json").read_text(encoding="utf-8"))
        self.do("graph => app.loadGraphData(graph)", graph)
        for kind, chosen in {**demo.SMALL, **values}.items():
            for widget, value in {**demo.SMALL.get(kind, {}), **chosen}.items():
                self.set(kind, widget, value)

    def set(self, kind, widget, value):
        self.do("""([kind, name, value]) => {
            for (const node of app.graph.nodes.filter(({ type }) => type === kind)) {
                const widget = node.widgets.find((each) => each.name === name);
                widget.value = value;
                widget.callback?.(value);
            }
        }""", [kind, widget, value])  # fmt: skip

    def show(self, kind):
        """Bring the first node of a class into the middle of the page, in its true size."""
        self.do("""kind => {
            const [node, { ds, canvas }] = [app.graph.nodes.find(({ type }) => type === kind), app.canvas];
            ds.scale = 0.8;
            ds.offset[0] = canvas.clientWidth / 2 / ds.scale - node.pos[0] - node.size[0] / 2;
            ds.offset[1] = canvas.clientHeight / 2 / ds.scale - node.pos[1] - node.size[1] / 2;
            app.canvas.setDirty(true, true);
        }""", kind)  # fmt: skip
        self.page.wait_for_timeout(300)

    def queue(self, kind):
        """Run the first node of a class, with what it needs."""
        assert self.do(
            "kind => app.queuePrompt(0, 1, [String(app.graph.nodes.find(({ type }) => type === kind).id)])", kind
        )

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def press(self, name):
        self.page.locator(f".vl-{name}").first.click(timeout=10000)


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    assert path, "there is no Chromium on this machine: install it (on Debian: apt-get install chromium)."
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield launched.new_context(viewport={"width": 1280, "height": 900})
        launched.close()


@pytest.fixture(scope="module")
def opened(server, chromium):
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # a new user is shown templates first
    yield Editor(chromium, server.url)
    server.post("/interrupt", {})  # what a failed test left at work


@pytest.fixture
def editor(opened):
    """A page in the classic rendering; nothing of ours may complain in its console."""
    opened.use_vue_nodes(False)
    opened.complaints.clear()
    yield opened
    assert not opened.complaints


def colours(editor, selector):
    """The different colours that a canvas shows: a blank one shows one."""
    return editor.do(PIXELS, selector)


def test_a_training_is_watched_paused_found_again_after_a_reload_stopped_and_compared(
    server, trained, chromium, editor
):
    editor.open("wan_t2v_train_loraid", VideoLoRATrain={"steps": 4000})
    editor.show("VideoLoRATrain")
    editor.until(f"() => {PANEL}.dataset.state === 'finished'")  # an earlier run of the same name
    editor.queue("VideoLoRATrain")
    editor.until(f"() => {PANEL}.dataset.state === 'running' && {PANEL}.dataset.step > 5", seconds=90)
    seen = int(editor.do(f"{PANEL}.dataset.step"))
    editor.until(f"seen => {PANEL}.dataset.step > seen", seen)  # the curve grows
    assert len(colours(editor, ".vl-training canvas")) > 10
    facts = editor.text(".vl-tiles")
    assert "/ 4,000" in facts and "2.00e-3" in facts and "GiB" in facts and re.search(r"0:\d\d:\d\d", facts)
    assert editor.page.locator(".vl-bar").count() > 2

    editor.press("pause")
    editor.until(f"() => {PANEL}.dataset.state === 'paused'")
    assert server.get("/videolora/runs")["runs"][0]["status"]["state"] == "paused"
    step = editor.do(f"{PANEL}.dataset.step")

    editor.use_vue_nodes(True)
    editor.reload()
    editor.until(f"step => {PANEL}?.dataset.state === 'paused' && {PANEL}.dataset.step === step", step)
    second = Editor(chromium, server.url)  # another tab
    second.open("wan_t2v_train_loraid")
    second.until(f"step => {PANEL}.dataset.state === 'paused' && {PANEL}.dataset.step === step", step)

    editor.show("VideoLoRATrain")
    editor.press("resume")
    second.until(f"step => {PANEL}.dataset.state === 'running' && Number({PANEL}.dataset.step) > step", int(step))
    editor.until("() => !document.querySelector('.vl-save').hidden")
    editor.press("save")
    saved = until(lambda: list((server.base / "output" / "loras").glob("character_1-step*.safetensors")))
    second.until(f"() => {PANEL}.innerText.includes('character_1-step')")
    saved[0].unlink()  # other tests average all that a training has saved
    second.show("VideoLoRATrain")
    second.press("stop")
    for page in (editor, second):
        page.until(f"() => {PANEL}.dataset.state === 'stopped'")
        assert page.page.locator(".vl-button:visible").count() == 0
    assert not editor.do("Boolean(app.extensionManager.lastExecutionError)"), "what the user has stopped is no error"
    until(lambda: not server.get("/queue")["queue_running"])
    (entry,) = server.get("/history?max_items=1").values()
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    second.page.close()
    assert not second.complaints

    editor.until("() => document.querySelectorAll('.vl-history tr').length >= 2")
    history = editor.text(".vl-history")
    assert "Stopped" in history and "Finished 12 / 12" in history and "steps 12" in history
    editor.do("document.querySelectorAll('.vl-history input')[1].click()")  # compare
    editor.until("() => document.querySelectorAll('.vl-legend span').length === 3")
    editor.do("document.querySelectorAll('.vl-history tr')[1].click()")  # look at the other one
    editor.until(f"() => {PANEL}.dataset.state === 'finished'")


def test_the_plan_and_the_sigma_curve_follow_the_values(editor):
    editor.open("wan_cfg_skip", VideoLoRAFlowSchedule={"steps": 8, "shift": 5.0})
    shown = "[...document.querySelectorAll('.vl-letters')].map(({ textContent }) => textContent).sort()"
    editor.until(f"() => {shown}.every((plan) => plan.length === 8)")
    assert "AAAASSSS" in editor.do(shown) and "AAAAAAAA" in editor.do(shown)
    editor.set("VideoLoRACFGSkip", "mode", "alternate")
    editor.until(f"() => {shown}.every((plan) => plan === 'SASASASA')")
    editor.set("VideoLoRACFGSkip", "ratio", 0.25)
    editor.until(f"() => {shown}.every((plan) => plan === 'SSSASSSA')")
    assert "flow shift 5" in editor.text(".vl-sigmas")
    editor.show("VideoLoRAFlowSchedule")
    before = editor.do("document.querySelector('.vl-sigmas canvas').toDataURL()")
    editor.set("VideoLoRAFlowSchedule", "shift", 1.0)
    editor.until("() => document.querySelector('.vl-sigmas').innerText.includes('flow shift 1')")
    assert editor.do("document.querySelector('.vl-sigmas canvas').toDataURL()") != before
    editor.use_vue_nodes(True)
    editor.set("VideoLoRAFlowSchedule", "steps", 4)
    editor.until(f"() => {shown}.every((plan) => plan === 'SSSA')")


@pytest.fixture(scope="module")
def lora(server, tmp_path_factory):
    """A LoRA file of LORAID 2 by slots."""
    path = server.base / "models" / "diffusion_models" / workflows.DIT
    checkpoint, part = open_part(path, "dit")
    matrices = inventory(FAMILIES[part.family], checkpoint.shapes(part.keymap))
    share = allocate(matrices, Loraid(number=2))
    sizes = {matrix.name: matrix for matrix in matrices}
    factors = {
        name: LoRAFactors(torch.ones(2, sizes[name].columns), torch.ones(sizes[name].rows, 2), 2.0)
        for name in share.rows
    }
    target = tmp_path_factory.mktemp("loras") / "of_two.safetensors"
    save(target, factors, share.metadata(part.family))
    return target, len(share.rows)


def drop(editor, selector, path):
    """What the browser does when a file is dropped on an element."""
    content = base64.b64encode(path.read_bytes()).decode()
    editor.do("""([selector, name, content]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name));
        document.querySelector(selector).dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }""", [selector, path.name, content])  # fmt: skip


def test_a_lora_dropped_on_the_map_shows_what_it_owns_and_where_it_collides(editor, lora):
    path, matrices = lora
    editor.open("wan_t2v_train_loraid", VideoLoRASelectLORAID={"unit": "slot", "units_per_id": 12, "loraid": 1})
    editor.until("() => document.querySelector('.vl-map').dataset.owned > 0")
    assert "LORAID 1 of 20" in editor.text(".vl-map .vl-caption") and "196,608 parameters" in editor.text(
        ".vl-map .vl-caption"
    )
    editor.show("VideoLoRASelectLORAID")
    assert len(colours(editor, ".vl-map canvas")) > 2
    drop(editor, ".vl-map", path)
    editor.until("() => document.querySelector('.vl-map').dataset.loras === '1'")
    assert "of_two.safetensors LORAID 2" in editor.text(".vl-loras") and "no parameter is owned twice" in editor.text(
        ".vl-loras"
    )
    editor.set("VideoLoRASelectLORAID", "loraid", 2)
    editor.until("() => document.querySelector('.vl-map').dataset.clashes === '1'")
    assert "LORAID 2 and of_two.safetensors both change" in editor.text(
        ".vl-loras"
    ) and f"in {matrices} matrices" in editor.text(".vl-loras")
    assert RED in colours(editor, ".vl-map canvas")
    editor.page.locator(".vl-loras button").click()
    editor.until("() => document.querySelector('.vl-map').dataset.loras === '0'")
    assert RED not in colours(editor, ".vl-map canvas")
    editor.set("VideoLoRASelectLORAID", "loraid", 99)
    editor.until("() => document.querySelector('.vl-map').innerText.includes('out of range')")


def test_a_file_that_is_no_lora_is_refused_in_the_map(editor, tmp_path):
    editor.open("wan_t2v_train_loraid")
    (tmp_path / "letter.txt").write_text("hello")
    drop(editor, ".vl-map", tmp_path / "letter.txt")
    editor.until("() => document.querySelector('.vl-map').innerText.includes('drop a LoRA as a .safetensors file')")
    save_file({"another.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    drop(editor, ".vl-map", tmp_path / "other.safetensors")
    editor.until("() => document.querySelector('.vl-loras').innerText.includes('other.safetensors is no LoRA')")


def test_the_preview_shows_windows_clips_and_a_report_with_its_lines(editor):
    editor.open(
        "wan_t2v_prepare_data", VideoLoRADatasetFolder={"folder": "character_1", "extraction": "chunk", "frames": "5"}
    )
    editor.queue("VideoLoRADatasetPreview")
    editor.until("() => document.querySelectorAll('.vl-strip').length === 4")
    editor.show("VideoLoRADatasetPreview")
    assert "96x64, 5 frames: 24 windows of 6 clips" in editor.text(".vl-data")
    assert editor.page.locator(".vl-clip").count() == 6 and editor.page.locator(".vl-clip > div").count() == 24
    strip = editor.page.locator(".vl-strip").first
    first = editor.do("document.querySelector('.vl-strip').style.backgroundPositionX")
    box = strip.bounding_box()
    editor.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 5)
    assert editor.do("document.querySelector('.vl-strip').style.backgroundPositionX") != first
    editor.until("() => document.querySelector('.vl-report')")
    report = editor.text(".vl-report").splitlines()
    assert report[0].startswith("character_1: 6 clips, 24 windows") and "together: 24 batches an epoch" in report


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found
