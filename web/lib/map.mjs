// The LORAID map: the model as blocks x kinds of matrices, what a LORAID owns of it, what LoRA files touch, and where they collide.
import { addPanel, element, number, whenRemoved } from "./dom.mjs";
import { resolved } from "./chart.mjs";
import { model, source, value } from "./graph.mjs";
import { hideReports } from "./report.mjs";
import { api } from "../../../scripts/api.js";
import { post, watch } from "./server.mjs";

const HEIGHT = 330;
const WIDTH = 460;
const OWN = "--vl-first";
const COLOURS = ["--vl-second", "--vl-third", "--vl-fourth", "--vl-fifth", "--vl-sixth", "--vl-seventh"];
const KEPT = "videolora_loras"; // among the node's properties: the files that were chosen for the map
const SHARPNESS = 2;
const TIP = 210; // pixels that what is told of a matrix takes
const LABEL = 11; // pixels of a row's name

export function addMapPanel(node) {
  const map = new LoraidMap(node);
  addPanel(node, "map", map.root, { height: HEIGHT, width: WIDTH });
  whenRemoved(node, () => map.close());
}

class LoraidMap {
  constructor(node) {
    this.node = node;
    this.selects = node.comfyClass === "VideoLoRASelectLORAID";
    if (this.selects) hideReports(node);
    this.dropped = []; // files that only this page has put here
    this.answer = null;
    this.build();
    this.end = watch("/videolora/map", () => this.question(), (answer, problem) => this.show(answer, problem));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.place);
  }

  close() {
    this.end();
    this.observer.disconnect();
  }

  // ---- what is asked

  question() {
    const opened = model(this.node);
    if (typeof opened === "string") return opened;
    let loraid = null;
    if (this.selects) {
      const [number, unit, units_per_id] = ["loraid", "unit", "units_per_id"].map((name) => value(this.node, name));
      if ([number, unit, units_per_id].includes(undefined)) return "A value comes from another node: this is drawn when it runs.";
      loraid = { number, unit, units_per_id };
    }
    return { ...opened, loraid, loras: this.loras() };
  }

  /** Files of the linked stack, chosen files, dropped files. */
  loras() {
    this.linked = this.selects ? [] : stack(this.node);
    const chosen = this.chosen.filter((file) => !this.linked.includes(file));
    return [...[...this.linked, ...chosen].map((file) => ({ file })), ...this.dropped].slice(0, 16);
  }

  get chosen() {
    const kept = this.node.properties?.[KEPT];
    return Array.isArray(kept) ? kept.filter((file) => typeof file === "string") : [];
  }

  set chosen(files) {
    this.node.properties ??= {};
    this.node.properties[KEPT] = files;
  }

  async drop(event) {
    event.preventDefault();
    event.stopPropagation();
    this.root.classList.remove("vl-over");
    for (const file of event.dataTransfer?.files ?? []) {
      this.note.textContent = `reading ${file.name} ...`;
      if (!file.name.toLowerCase().endsWith(".safetensors")) {
        this.note.textContent = `${file.name} cannot be shown: drop a LoRA as a .safetensors file.`;
        continue;
      }
      try {
        this.dropped.push({ name: file.name, ...(await post(`/videolora/dropped?${new URLSearchParams({ name: file.name })}`, file)) });
        this.note.textContent = "";
      } catch (error) {
        this.note.textContent = error.message;
      }
    }
  }

  remove(index) {
    const lora = this.loras()[index];
    if (lora.file !== undefined) this.chosen = this.chosen.filter((file) => file !== lora.file);
    else this.dropped = this.dropped.filter((one) => one !== lora);
  }

  // ---- what is shown

  build() {
    this.caption = element("div", { class: "vl-caption" });
    this.canvas = element("canvas", { role: "img", "aria-label": "LORAID map" });
    this.tip = element("div", { class: "vl-tip", hidden: true });
    this.place = element("div", { class: "vl-chart vl-grid" }, this.canvas, this.tip);
    this.list = element("div", { class: "vl-loras" });
    this.note = element("span", { class: "vl-faint" });
    this.files = element("select", { "aria-label": "Add a LoRA of the loras folder", onpointerdown: () => this.offer(),
      onfocus: () => this.offer(), onchange: () => this.add(this.files.value) }, element("option", { value: "" }, "Add a LoRA ..."));
    this.root = element("div", { class: "vl-map" }, this.caption, this.place, this.list,
      element("div", { class: "vl-row" }, this.files, element("span", { class: "vl-faint" }, "or drop LoRA files here"), this.note));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("click", (event) => this.pick(event));
    const over = (event) => {
      if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
      event.preventDefault();
      event.stopPropagation();
      this.root.classList.add("vl-over");
    };
    this.root.addEventListener("dragenter", over);
    this.root.addEventListener("dragover", over);
    this.root.addEventListener("dragleave", () => this.root.classList.remove("vl-over"));
    this.root.addEventListener("drop", (event) => this.drop(event));
  }

  /** Fill the list of files, once in a while: it may have changed. */
  async offer() {
    if (Date.now() - (this.offered ?? 0) < 5000) return;
    this.offered = Date.now();
    const files = await (await api.fetchApi("/models/loras")).json();
    this.files.replaceChildren(element("option", { value: "" }, "Add a LoRA ..."), ...files.map((file) => element("option", { value: file }, file)));
  }

  add(file) {
    if (file && !this.chosen.includes(file)) this.chosen = [...this.chosen, file];
    this.files.value = "";
  }

  show(answer, problem) {
    this.answer = answer;
    this.problem = problem;
    this.cells = new Map();
    if (answer) for (const [index, [block, kind]] of answer.matrices.entries()) this.cells.set(`${block} ${kind}`, index);
    this.twice = new Map(); // index of a matrix -> what is touched twice
    for (const { rows } of answer?.shared ?? []) for (const [index, start, stop] of rows) this.twice.set(index, [...(this.twice.get(index) ?? []), [start, stop]]);
    this.tell();
    this.draw();
  }

  tell() {
    const { answer } = this;
    if (!answer) return this.caption.replaceChildren(element("span", { class: "vl-faint" }, this.problem)), this.list.replaceChildren();
    const { own } = answer;
    const share = (parameters) => `${number(parameters)} parameters, ${number((100 * parameters) / answer.parameters, 3)} %`;
    this.caption.replaceChildren(...(own?.error
      ? [element("span", { class: "vl-wrong" }, own.error)]
      : own
        ? [element("b", {}, `LORAID ${own.number} of ${own.count}`), element("span", { class: "vl-faint" }, ` owns ${share(own.parameters)} of ${answer.model}`)]
        : [element("b", {}, answer.model), element("span", { class: "vl-faint" }, ` ${answer.blocks.length} blocks, ${answer.matrices.length} matrices`)]));
    const clashes = answer.shared.map(({ between: [a, b], rows, parameters }) =>
      element("div", { class: "vl-wrong" }, `${this.name(a)} and ${this.name(b)} both change ${number(parameters)} parameters in ${rows.length} matrices`));
    const parties = answer.loras.length + (own && !own.error ? 1 : 0);
    const peace = parties > 1 && !clashes.length && answer.loras.every(({ error }) => !error);
    this.list.replaceChildren(
      ...clashes,
      ...answer.loras.map((lora, index) => element("div", { title: lora.error ?? lora.text },
        element("i", { style: { background: `var(${colourOf(index)})` } }), lora.name,
        element("span", { class: lora.error ? "vl-wrong" : "vl-faint" }, lora.error ? ` ${lora.error}` : ` ${lora.loraid ? `LORAID ${lora.loraid}, ` : ""}${share(lora.parameters)}`),
        this.linked.includes(this.loras()[index]?.file) ? null
          : element("button", { class: "vl-tab", title: "Take it off the map", "aria-label": `Take ${lora.name} off`, onclick: () => this.remove(index) }, "×"))),
      ...(peace ? [element("div", { class: "vl-right" }, "no parameter is owned twice")] : []));
    this.root.dataset.clashes = clashes.length;
    this.root.dataset.loras = answer.loras.length;
    this.root.dataset.owned = own?.rows?.length ?? 0;
  }

  name(who) {
    return who === "own" ? `LORAID ${this.answer.own.number}` : this.answer.loras[who].name;
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.place;
    const { answer } = this;
    const ratio = Math.max(SHARPNESS, window.devicePixelRatio || 1);
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    if (!answer || width < 60) return;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.root);
    context.font = `${LABEL - 1}px ${style.fontFamily}`;
    const left = Math.ceil(Math.max(...answer.kinds.map((kind) => context.measureText(kind).width))) + 8;
    const wide = (width - left) / answer.blocks.length;
    const groups = grouped(answer.blocks);
    const below = (LABEL + 4) * (groups.length > 1 ? 2 : 1); // numbers of blocks, and where there are several kinds of blocks their names
    const high = (height - below) / answer.kinds.length;
    this.frame = { left, wide, high, width, height };
    context.fillStyle = style.getPropertyValue("--vl-faint");
    context.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(LABEL / high));
    answer.kinds.forEach((kind, at) => at % every || context.fillText(kind, 0, (at + 0.5) * high));
    context.textBaseline = "alphabetic";
    const step = Math.max(1, Math.ceil(26 / wide));
    const numbers = answer.blocks.map((block) => block.match(/\d+/)?.[0] ?? block);
    context.textAlign = "center";
    const line = height - below + LABEL + 2;
    numbers.forEach((text, at) => Number(text) % step || context.fillText(text, left + (at + 0.5) * wide, line));
    if (groups.length > 1) for (const [name, first, count] of groups) context.fillText(name, left + (first + count / 2) * wide, height - 2, count * wide);
    const gap = wide > 5 && high > 5 ? 1 : 0.5;
    const box = ([block, kind], [start, stop], rows, colour) => {
      const full = high - gap;
      const tall = Math.max(2, (full * (stop - start)) / rows);
      context.fillStyle = resolved(style, `var(${colour})`);
      context.fillRect(left + block * wide, kind * high + Math.min((full * start) / rows, full - tall), wide - gap, tall);
    };
    for (const matrix of answer.matrices) box(matrix, [0, matrix[2]], matrix[2], "--vl-grid");
    const owners = [...answer.loras.map((lora, at) => [lora, colourOf(at)]), [answer.own, OWN]];
    for (const [owner, colour] of owners) {
      for (const [index, start, stop] of owner?.rows ?? []) box(answer.matrices[index], [start, stop], answer.matrices[index][2], colour);
    }
    for (const [index, spans] of this.twice) for (const span of spans) box(answer.matrices[index], span, answer.matrices[index][2], "--vl-bad");
  }

  /** The index of the matrix under the pointer, and where the pointer is in the panel. */
  under(event) {
    if (!this.frame || !this.answer) return [undefined];
    const { left, wide, high, width, height } = this.frame;
    const bounds = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * width; // the page may show the panel enlarged
    const y = ((event.clientY - bounds.top) / bounds.height) * height;
    return [this.cells.get(`${Math.floor((x - left) / wide)} ${Math.floor(y / high)}`), x, y];
  }

  point(event) {
    const [index, x, y] = this.under(event);
    this.tip.hidden = index === undefined;
    if (this.tip.hidden) return;
    const { answer } = this;
    const [block, kind, rows, columns] = answer.matrices[index];
    const lines = [element("div", {}, element("b", {}, `${answer.blocks[block]}.${answer.kinds[kind]}`)), element("div", {}, `${number(rows)} x ${number(columns)}`)];
    const owners = [[answer.own, OWN, answer.own && `LORAID ${answer.own.number}`], ...answer.loras.map((lora, at) => [lora, colourOf(at), lora.name])];
    for (const [owner, colour, name] of owners) {
      const own = owner?.rows?.find(([at]) => at === index);
      if (own) lines.push(element("div", {}, element("i", { style: { background: `var(${colour})` } }), `${name}: ${own[1] || own[2] < rows ? `rows ${own[1]} to ${own[2] - 1}` : "all of it"}`));
    }
    const owner = answer.own?.owners?.[index];
    if (owner && owner !== answer.own.number) lines.push(element("div", { class: "vl-faint" }, `LORAID ${owner}'s: click to choose it`));
    if (this.twice.has(index)) lines.push(element("div", { class: "vl-wrong" }, "changed by more than one"));
    this.tip.replaceChildren(...lines);
    const [right, low] = [x > this.frame.width - TIP && x > TIP / 2, y > this.frame.height / 2];
    Object.assign(this.tip.style, { left: right ? "auto" : `${x + 12}px`, right: right ? `${this.frame.width - x + 12}px` : "auto",
      top: low ? "auto" : `${y + 8}px`, bottom: low ? `${this.frame.height - y + 8}px` : "auto" });
  }

  /** Choose the LORAID that owns what was clicked. */
  pick(event) {
    const owner = this.answer?.own?.owners?.[this.under(event)[0]];
    const widget = this.node.widgets?.find(({ name }) => name === "loraid");
    if (!owner || !widget) return;
    this.tip.hidden = true;
    widget.value = owner;
    widget.callback?.(owner);
    this.node.setDirtyCanvas?.(true, true);
  }
}

/** ["a.0", "a.1", "b.0"] -> [["a", 0, 2], ["b", 2, 1]]: kinds of blocks, where each begins, and how many there are. */
function grouped(blocks) {
  const found = [];
  blocks.forEach((block, at) => {
    const name = block.replace(/\.\d+.*/, "");
    if (found.at(-1)?.[0] === name) found.at(-1)[2] += 1;
    else found.push([name, at, 1]);
  });
  return found;
}

function colourOf(index) {
  return COLOURS[index % COLOURS.length];
}

/** The files of the linked stack, in its order. */
function stack(node) {
  const files = [];
  for (let loader = source(node, "loras"); loader && files.length < 16; loader = source(loader, "loras")) {
    const file = loader.comfyClass === "VideoLoRALoadLoRA" ? value(loader, "lora") : undefined;
    if (typeof file === "string") files.unshift(file);
  }
  return files;
}
