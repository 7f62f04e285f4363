// The training node's panel: how its run goes, whichever page or program started it, and its earlier runs to compare with.
import { Chart, nearest, range, smoothed } from "./chart.mjs";
import { addPanel, duration, element, number, whenRemoved } from "./dom.mjs";
import { isNode, value, workflowId } from "./graph.mjs";
import { hideReports } from "./report.mjs";
import { fileUrl, get, on, post } from "./server.mjs";

const HEIGHT = 470; // pixels, at least
const WIDTH = 520;
const LIVELY = 1000; // milliseconds between two looks at a run that is at work
const PATIENT = 4000; // and after the server has not answered
const COLOURS = ["--vl-second", "--vl-third", "--vl-fourth", "--vl-fifth"]; // of runs to compare with
const BANDS = 10; // tenths of the timesteps, as the server sorts samples
const RECENT = 200; // samples that the bars are of
const TITLES = { starting: "Starting", running: "Training", paused: "Paused", stopped: "Stopped", finished: "Finished", failed: "Failed" };
const ALIVE = new Set(["starting", "running", "paused"]);
const ASKED = { stop: "Stopping after this step", pause: "Pausing after this step", save: "Saving after this step" };
const COLUMNS = ["step", "loss", "average", "rate", "validation", "samples"];

export function addTrainingPanel(node) {
  hideReports(node);
  const panel = new TrainingPanel(node);
  addPanel(node, "training", panel.root, { height: HEIGHT, width: WIDTH });
  whenRemoved(node, () => panel.close());
}

/** A run's steps, read on from where the last answer ended. */
class Followed {
  constructor(id) {
    this.id = id;
    this.clear();
  }

  clear() {
    this.columns = Object.fromEntries(COLUMNS.map((name) => [name, []]));
  }

  /** Whoever asks while an answer is awaited gets the same one: steps must not be taken in twice. */
  read() {
    this.reading ??= this.ask().finally(() => (this.reading = null));
    return this.reading;
  }

  async ask() {
    const after = this.answer ? `?${new URLSearchParams({ after: this.answer.cursor })}` : "";
    const answer = await get(`/videolora/runs/${encodeURIComponent(this.id)}/steps${after}`);
    if (answer.anew) this.clear();
    for (const name of COLUMNS) this.columns[name].push(...answer.columns[name]);
    answer.now ??= answer.anew ? null : this.answer?.now;
    this.answer = answer;
  }

  get isAtWork() {
    return ALIVE.has(this.answer?.status.state);
  }
}

class TrainingPanel {
  constructor(node) {
    this.node = node;
    this.runs = []; // of this node, the latest first
    this.run = null; // the one that is shown
    this.compared = new Map(); // id -> Followed
    this.sight = "loss";
    this.weight = 0.9;
    this.step = null; // of the previews that are looked at; null: the newest
    this.build();
    this.ends = [
      on("videolora.run", (told) => this.belongs(told) && this.find(told.id)),
      on("reconnected", () => this.find()),
      on("execution_success", () => this.find()),
    ];
    this.timer = setInterval(() => this.look(), LIVELY);
    this.named = null;
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    this.ends.forEach((end) => end());
    this.chart.close();
  }

  // ---- which runs

  /** A run is this node's when the node queued it last, or when it makes the LoRA of the node's name. */
  belongs({ name, origin = {} }) {
    const own = value(this.node, "name");
    const same = origin.workflow && origin.workflow === workflowId() && isNode(this.node, origin.node);
    return same || (typeof own === "string" && name === own.replace(/\.safetensors$/, ""));
  }

  /** Read the list of runs anew and show the run `id`, or the latest. */
  async find(id = null) {
    try {
      const { runs } = await get("/videolora/runs");
      this.runs = runs.filter((run) => this.belongs(run));
    } catch (error) {
      return this.say(error.message);
    }
    const chosen = this.runs.find((run) => run.id === (id ?? this.run?.id)) ?? this.runs[0];
    await this.choose(chosen?.id ?? null);
  }

  async choose(id) {
    if (id !== this.run?.id) {
      this.run = id ? new Followed(id) : null;
      this.step = null;
      this.compared.delete(id);
    }
    await this.read();
    this.history();
  }

  /** Once a second: the run that is at work, or whether the node bears another name. */
  look() {
    if (document.hidden || this.busy || !this.node.graph) return;
    const named = `${value(this.node, "name")} ${workflowId()}`;
    if (named !== this.named) {
      this.named = named;
      this.run = null;
      this.find();
    } else if (this.lost ? Date.now() - this.lost > PATIENT : this.run?.isAtWork) this.read();
  }

  async read() {
    if (!this.run) return this.draw();
    this.busy = true;
    const [run, before] = [this.run, this.run.answer?.status.state];
    try {
      await run.read();
      this.lost = null;
    } catch {
      this.lost = Date.now();
      this.root.dataset.state = "lost";
      this.state.textContent = "No answer from the server";
      this.doing.textContent = run.isAtWork ? "The training goes on without it." : "";
      for (const button of Object.values(this.buttons)) button.hidden = true;
      return;
    } finally {
      this.busy = false;
    }
    if (run !== this.run || this.closed) return;
    this.draw();
    if (before && before !== run.answer.status.state) this.find(run.id);
  }

  async command(name) {
    const { id } = this.run;
    try {
      await post(`/videolora/runs/${encodeURIComponent(id)}/${name}`);
      await this.read();
    } catch (error) {
      this.say(error.message);
    }
  }

  // ---- what is shown

  build() {
    const button = (name, title, text) =>
      element("button", { class: `vl-button vl-${name}`, title, onclick: () => this.command(name) }, text);
    this.buttons = {
      pause: button("pause", "Save, and wait after the running step", "Pause"),
      resume: button("resume", "Go on", "Resume"),
      save: button("save", "Write a LoRA after the running step and go on", "Save now"),
      stop: button("stop", "Save, and end after the running step; queue again to go on", "Stop"),
    };
    this.state = element("span", { class: "vl-state" });
    this.doing = element("span", { class: "vl-faint vl-doing" });
    this.bar = element("div");
    this.tiles = element("div", { class: "vl-tiles" });
    this.message = element("div", { class: "vl-message", hidden: true });
    this.chart = new Chart({ describe: (x) => this.describe(x), height: 170, label: "Loss" });
    this.legend = element("div", { class: "vl-legend" });
    this.bands = element("div", { class: "vl-bands" });
    this.previews = element("div", { class: "vl-previews", hidden: true });
    this.earlier = element("div", { class: "vl-history", hidden: true });
    this.tabs = ["loss", "rate"].map((name) =>
      element("button", { class: "vl-tab", "data-sight": name, onclick: () => this.see(name) }, { loss: "Loss", rate: "Learning rate" }[name]),
    );
    this.smoothing = element("input", {
      type: "range", min: 0, max: 0.99, step: 0.01, value: this.weight, "aria-label": "Smoothing",
      oninput: () => { this.weight = Number(this.smoothing.value); this.plot(); },
    });
    this.logarithmic = element("input", { type: "checkbox", onchange: () => this.plot() });
    this.root = element("div", { class: "vl-training" },
      element("div", { class: "vl-head" }, this.state, this.doing, element("span", { class: "vl-space" }), ...Object.values(this.buttons)),
      element("div", { class: "vl-progress" }, this.bar),
      this.tiles,
      this.message,
      element("div", { class: "vl-row" }, ...this.tabs, element("span", { class: "vl-space" }),
        element("label", { title: "How much of the noise is smoothed away" }, "Smoothing", this.smoothing),
        element("label", { title: "Logarithmic axis" }, this.logarithmic, "log")),
      this.chart.root, this.legend, this.bands, this.previews, this.earlier,
    );
    this.draw();
  }

  see(sight) {
    this.sight = sight;
    this.plot();
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  draw() {
    const { answer } = this.run ?? {};
    const { state, step = 0, doing, error } = answer?.status ?? {};
    const [alive, asked] = [this.run?.isAtWork, answer?.asked ?? []];
    this.root.dataset.state = state ?? "none";
    this.root.dataset.step = this.run?.columns.step.at(-1) ?? 0;
    this.state.textContent = TITLES[state] ?? "Not trained yet";
    const waiting = state === "paused" && asked.includes("pause") ? [] : asked;
    this.doing.textContent = !answer
      ? "Queue the workflow to start."
      : alive ? (ASKED[waiting[0]] ?? doing ?? "") : state === "stopped" ? "Queue again to go on." : "";
    const waits = state === "paused" || asked.includes("pause");
    const offered = { pause: !waits, resume: waits, save: state !== "paused", stop: true }; // a paused run is saved
    for (const [name, button] of Object.entries(this.buttons)) {
      button.hidden = !alive || !offered[name];
      button.disabled = state === "starting" || asked.includes("stop") || asked.includes(name);
    }
    const reached = Math.max(step, this.run?.columns.step.at(-1) ?? 0);
    this.bar.style.width = `${answer?.steps ? (100 * reached) / answer.steps : 0}%`;
    this.tiles.replaceChildren(...this.facts(answer, reached).map(([title, text, hint]) =>
      element("div", { title: hint ?? title }, element("b", {}, text), element("span", {}, title))));
    const told = alive && (!reached || answer.log.includes(" saved ")) ? [answer.log] : (answer?.status.files ?? []).map((file) => `saved ${file}`);
    this.say(error ?? answer?.error ?? [...told, ...(answer?.notes ?? []).slice(-3)].join("\n"));
    this.message.classList.toggle("vl-error", Boolean(error ?? answer?.error));
    this.plot();
    this.bars();
    this.showPreviews();
  }

  facts(answer, reached) {
    const { columns } = this.run ?? {};
    const now = answer?.now;
    const pace = now?.seconds;
    return [
      ["step", answer ? `${number(reached)} / ${number(answer.steps)}` : "–"],
      ["loss", number(columns?.average.at(-1)), "Mean loss of the last 100 steps"],
      ["learning rate", columns?.rate.length ? columns.rate.at(-1).toExponential(2) : "–"],
      ["left", this.run?.isAtWork && now ? duration(now.seconds_left) : "–", "Time left at the pace of the last 100 steps"],
      ["per step", pace ? `${number(pace, 3)} s` : "–"],
      ["memory", now ? `${number(now.memory / 2 ** 30, 3)} GiB` : "–", "Most memory held so far"],
    ];
  }

  // ---- the curve

  plot() {
    for (const tab of this.tabs) tab.classList.toggle("vl-on", tab.dataset.sight === this.sight);
    const isLoss = this.sight === "loss";
    const others = [...this.compared.values()].map((run) => [run, run.colour]);
    this.drawn = [...others, ...(this.run ? [[this.run, "--vl-first"]] : [])] // the one that is shown lies on top
      .map(([run, colour]) => ({ run, colour: `var(${colour})`, ys: isLoss ? smoothed(run.columns.loss, this.weight) : run.columns.rate }));
    const lines = [];
    const seen = [];
    for (const { run, colour, ys } of this.drawn) {
      const { step: xs, loss, validation } = run.columns;
      if (isLoss && run === this.run) {
        lines.push({ xs, ys: loss, colour, faint: true, width: 1 });
        seen.push(...(range(loss) ?? []));
      }
      lines.push({ xs, ys, colour, width: 2 });
      seen.push(...(range(ys, 0) ?? []));
      if (isLoss && run === this.run && validation.some((one) => one !== null)) {
        lines.push({ xs, ys: validation, colour: "var(--vl-third)", dots: true });
        seen.push(...range(validation, 0));
      }
    }
    const last = Math.max(10, ...this.drawn.map(({ run }) => run.columns.step.at(-1) ?? 1));
    this.chart.show({
      lines, domain: [0, last], span: range(seen, 0) ?? [0, 1], logarithmic: this.logarithmic.checked,
      format: (shown) => number(shown, 3),
    });
    const told = [];
    if (isLoss && this.run?.columns.step.length) {
      told.push(["var(--vl-first)", "each step", true], ["var(--vl-first)", "smoothed"]);
      if (this.run.columns.validation.some((one) => one !== null)) told.push(["var(--vl-third)", "validation"]);
    }
    for (const run of this.compared.values()) told.push([`var(${run.colour})`, this.title(run.id)]);
    this.legend.replaceChildren(...told.map(([colour, text, faint]) =>
      element("span", {}, element("i", { class: faint ? "vl-pale" : "", style: { background: colour } }), text)));
  }

  describe(x) {
    const { step, loss, validation } = this.run?.columns ?? { step: [] };
    const at = nearest(step, x);
    if (at < 0) return null;
    const texts = [[null, `step ${number(step[at])}`]];
    const points = [];
    for (const { run, colour, ys } of this.drawn) {
      const own = run === this.run ? at : nearest(run.columns.step, x);
      if (own < 0 || ys[own] === null) continue;
      points.push({ y: ys[own], colour });
      texts.push([colour, this.sight === "loss" ? `${number(ys[own])} smoothed` : ys[own].toExponential(2)]);
    }
    if (this.sight === "loss") {
      texts.splice(1, 0, [null, loss[at] === null ? "skipped, not finite" : `${number(loss[at])} this step`]);
      if (validation[at] !== null) texts.push(["var(--vl-third)", `${number(validation[at])} validation`]);
    }
    return { x: step[at], points, texts };
  }

  /** The loss in each tenth of the noise levels: of late, and a line where it began. */
  bars() {
    const samples = this.run?.columns.samples ?? [];
    const late = means(samples.slice(-RECENT));
    const early = means(samples.slice(0, RECENT));
    const highest = Math.max(1e-12, ...late.filter(Number.isFinite), ...early.filter(Number.isFinite));
    const bars = late.map((loss, band) => {
      const [from, to] = [band * 100, band * 100 + 100];
      const hint = `timesteps ${from} to ${to}: loss ${number(loss)}, in the beginning ${number(early[band])}`;
      return element("div", { title: hint },
        loss === null ? null : element("div", { class: "vl-bar", style: { height: `${(100 * loss) / highest}%` } }),
        early[band] === null ? null : element("div", { class: "vl-was", style: { bottom: `${(100 * early[band]) / highest}%` } }),
        element("span", {}, String(from)));
    });
    this.bands.replaceChildren(
      element("div", { class: "vl-faint", title: "What is noisier is harder to tell apart: compare a bar with its own line, not with its neighbours." },
        `Loss by timestep, 0 clean to 1000 noise: last ${RECENT} steps; the line is where it began`),
      element("div", { class: "vl-barred" }, ...bars));
    this.bands.hidden = !samples.length;
  }

  // ---- previews

  showPreviews() {
    const found = this.run?.answer?.previews ?? [];
    this.previews.hidden = !found.length;
    if (!found.length) return this.previews.replaceChildren();
    const steps = [...new Set(found.map(({ step }) => step))];
    const step = steps.includes(this.step) ? this.step : steps.at(-1);
    const key = JSON.stringify([this.run.id, step, found.length]);
    if (key === this.previews.dataset.key) return; // videos go on playing
    this.previews.dataset.key = key;
    const slider = element("input", { type: "range", min: 0, max: steps.length - 1, value: steps.indexOf(step), "aria-label": "Step of the previews",
      oninput: () => {
        const index = Number(slider.value);
        this.step = index === steps.length - 1 ? null : steps[index];
        this.showPreviews();
      } });
    const old = this.previews.querySelector("input");
    const shown = found.filter((one) => one.step === step).map((one) => {
      const url = fileUrl(one);
      const video = one.filename.endsWith(".mp4");
      const sight = video
        ? element("video", { src: url, autoplay: true, loop: true, playsinline: true })
        : element("img", { src: url, alt: `preview ${one.number} after step ${step}` });
      if (video) sight.muted = true; // the attribute alone does not let it play by itself
      return element("a", { href: url, target: "_blank", title: `Prompt ${one.number + 1}, after step ${step}` }, sight);
    });
    const count = element("span", { class: "vl-faint" }, `Previews after step ${number(step)}`);
    const row = element("div", { class: "vl-row" }, count, element("span", { class: "vl-space" }), steps.length > 1 ? slider : null);
    if (old && steps.length > 1 && document.activeElement === old && Number(old.max) === steps.length - 1) {
      this.previews.querySelector(".vl-faint").replaceWith(count); // the slider is being dragged
      this.previews.lastElementChild.replaceWith(element("div", { class: "vl-sheets" }, ...shown));
      return;
    }
    this.previews.replaceChildren(row, element("div", { class: "vl-sheets" }, ...shown));
  }

  // ---- earlier runs

  title(id) {
    const run = this.runs.find((one) => one.id === id);
    if (!run) return id;
    const several = new Set(this.runs.map(({ name }) => name)).size > 1;
    const when = new Date(run.queued * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    return several ? `${run.name ?? run.id}, ${when}` : when;
  }

  history() {
    this.earlier.hidden = this.runs.length < 2;
    if (this.earlier.hidden) return this.earlier.replaceChildren();
    const shown = this.runs.find(({ id }) => id === this.run?.id) ?? this.runs[0];
    const rows = this.runs.map((run) => {
      const isShown = run.id === this.run?.id;
      const compared = this.compared.get(run.id);
      const box = element("input", { type: "checkbox", title: "Draw its curve too", disabled: isShown, "aria-label": "Compare",
        style: compared ? { accentColor: `var(${compared.colour})` } : {}, onchange: () => this.compare(run.id, box.checked) });
      box.checked = isShown || Boolean(compared);
      return element("tr", { class: isShown ? "vl-on" : "", onclick: ({ target }) => target === box || this.choose(run.id), title: "Show this run" },
        element("td", {}, box),
        element("td", {}, this.title(run.id)),
        element("td", { "data-state": run.status.state }, `${TITLES[run.status.state] ?? ""} ${ALIVE.has(run.status.state) ? "" : `${number(run.status.step)} / ${number(run.steps)}`}`),
        element("td", { class: "vl-faint" }, run.error ?? (isShown ? "shown" : differences(run.settings, shown.settings))));
    });
    this.earlier.replaceChildren(element("div", { class: "vl-faint" }, "Runs of this node: click one to show it, tick to compare"),
      element("table", {}, element("tbody", {}, ...rows)));
  }

  async compare(id, wanted) {
    if (!wanted) this.compared.delete(id);
    else {
      const run = new Followed(id);
      const taken = [...this.compared.values()].map(({ colour }) => colour);
      run.colour = COLOURS.find((colour) => !taken.includes(colour)) ?? COLOURS[0];
      try {
        await run.read();
        this.compared.set(id, run);
      } catch (error) {
        this.say(error.message);
      }
    }
    this.plot();
    this.history();
  }
}

/** The mean loss in each band; null where there are none. */
function means(steps) {
  const found = Array.from({ length: BANDS }, () => []);
  for (const [band, loss] of steps.flat()) if (loss !== null) found[band].push(loss);
  return found.map((losses) => (losses.length ? losses.reduce((a, b) => a + b) / losses.length : null));
}

/** What a run was set otherwise than another: "rank 8, learning_rate 0.001". */
function differences(settings = {}, others = {}) {
  const names = new Set([...Object.keys(settings), ...Object.keys(others)]);
  const told = [...names]
    .filter((name) => JSON.stringify(settings[name]) !== JSON.stringify(others[name]))
    .map((name) => `${name.startsWith("loraid.") ? name.replace(".", " ") : name.split(".").at(-1)} ${settings[name] ?? "none"}`);
  return told.join(", ") || "the same settings, other data";
}
