// Line charts on a canvas: axes with numbers, a faint raw line under a strong smoothed one, and the values under the pointer.
import { element, number } from "./dom.mjs";

const LEFT = 46;
const BOTTOM = 20;
const TOP = 8;
const RIGHT = 10;
const SHARPNESS = 2; // pixels of the canvas for one of the page, at least: panels are shown enlarged too

/**
 * Exponentially weighted mean, freed of its start (Adam's correction, arXiv 1412.6980), as TensorBoard smooths.
 * `weight` 0..1 is what is kept at each step; null where a value is null.
 */
export function smoothed(values, weight) {
  let [sum, kept] = [0, 1];
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + (1 - weight) * value;
    kept *= weight;
    return sum / (1 - kept);
  });
}

/** About `count` round numbers from `low` to `high`. */
export function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => span / each <= count);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + span * 1e-9; index += 1) found.push(index * step);
  return found;
}

/** Lowest and highest of what most values lie in, so that a few wild ones do not flatten the rest. */
export function range(values, wild = 0.01) {
  const sorted = values.filter((value) => value !== null && Number.isFinite(value)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const at = (share) => sorted[Math.round((sorted.length - 1) * share)];
  return [at(wild), at(1 - wild)];
}

export class Chart {
  /** `describe(x)` gives the texts that are shown beside the pointer: [colour, text] each, or null. */
  constructor({ describe, height = 150, label = "" }) {
    this.describe = describe;
    this.label = label;
    this.lines = [];
    this.marks = [];
    this.domain = [0, 1];
    this.span = [0, 1];
    this.format = number;
    this.pointer = null;
    this.canvas = element("canvas", { role: "img", "aria-label": label });
    this.tip = element("div", { class: "vl-tip", hidden: true });
    this.root = element("div", { class: "vl-chart", style: { minHeight: `${height}px` } }, this.canvas, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.root);
  }

  /**
   * `lines`: {xs, ys, colour (a CSS value), width, faint, dots, stepped}; `domain` and `span` are [low, high] of x and y;
   * `marks`: {y, text} are dashed lines across; `logarithmic` of y.
   */
  show({ lines, domain, span, marks = [], logarithmic = false, format = number }) {
    Object.assign(this, { lines, marks, logarithmic, format });
    this.domain = domain[1] > domain[0] ? domain : [domain[0], domain[0] + 1];
    this.span = widened(span, logarithmic);
    this.draw();
  }

  x(value) {
    const [low, high] = this.domain;
    return LEFT + ((value - low) / (high - low)) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    const scale = this.logarithmic ? Math.log10 : (same) => same;
    const [low, high] = this.span.map(scale);
    return this.height - BOTTOM - ((scale(value) - low) / (high - low)) * (this.height - BOTTOM - TOP);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.root;
    if (width < LEFT + RIGHT + 20 || height < TOP + BOTTOM + 20) return;
    Object.assign(this, { width, height });
    const ratio = Math.max(SHARPNESS, window.devicePixelRatio || 1);
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.root);
    this.axes(context, style);
    context.save();
    context.beginPath();
    context.rect(LEFT, TOP - 4, width - LEFT - RIGHT + 4, height - TOP - BOTTOM + 6);
    context.clip();
    for (const line of this.lines) this.line(context, style, line);
    context.restore();
    if (this.pointer !== null) this.crosshair(context, style);
  }

  axes(context, style) {
    context.font = `10px ${style.fontFamily}`;
    context.fillStyle = style.getPropertyValue("--vl-faint");
    context.strokeStyle = style.getPropertyValue("--vl-grid");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const value of this.heights()) {
      const y = Math.round(this.y(value)) + 0.5;
      stroke(context, LEFT, y, this.width - RIGHT, y);
      context.fillText(this.format(value), LEFT - 6, y);
    }
    context.textBaseline = "alphabetic";
    const across = ticks(...this.domain, Math.max(2, Math.floor((this.width - LEFT) / 70)));
    for (const value of across.filter(Number.isInteger)) {
      context.textAlign = this.x(value) > this.width - 20 ? "right" : "center";
      context.fillText(number(value), this.x(value), this.height - 5);
    }
    context.setLineDash([4, 4]);
    for (const { y: value, text } of this.marks) {
      if (value < this.span[0] || value > this.span[1]) continue;
      const y = Math.round(this.y(value)) + 0.5;
      context.strokeStyle = style.getPropertyValue("--vl-faint");
      stroke(context, LEFT, y, this.width - RIGHT, y);
      context.textAlign = "left";
      context.fillText(text, LEFT + 4, y + 12);
    }
    context.setLineDash([]);
  }

  /** Where lines across are drawn. */
  heights() {
    const count = Math.max(2, Math.floor((this.height - TOP - BOTTOM) / 28));
    if (!this.logarithmic) return ticks(...this.span, count);
    const [low, high] = this.span.map(Math.log10);
    if (high - low < 1) return ticks(...this.span, count);
    return ticks(Math.ceil(low), Math.floor(high), count).filter(Number.isInteger).map((power) => 10 ** power);
  }

  line(context, style, { xs, ys, colour, width = 1.5, faint = false, dots = false }) {
    context.strokeStyle = context.fillStyle = resolved(style, colour);
    context.globalAlpha = faint ? 0.3 : 1;
    context.lineWidth = width;
    context.lineJoin = "round";
    context.beginPath();
    let drawing = false;
    let column = null; // where points are dense, each pixel gets the first, lowest, highest and last of its own
    const finish = () => {
      if (!column) return;
      for (const y of [column.low, column.high, column.last]) context.lineTo(column.x, y);
      column = null;
    };
    for (let index = 0; index < xs.length; index += 1) {
      if (ys[index] === null || (this.logarithmic && ys[index] <= 0)) {
        finish();
        drawing = false;
        continue;
      }
      const [x, y] = [this.x(xs[index]), this.y(ys[index])];
      if (dots || (xs.length === 1 && !faint)) {
        context.moveTo(x + 2.5, y);
        context.arc(x, y, 2.5, 0, 2 * Math.PI);
        continue;
      }
      if (column && x - column.x < 0.5) {
        column.low = Math.max(column.low, y);
        column.high = Math.min(column.high, y);
        column.last = y;
        continue;
      }
      finish();
      if (drawing) context.lineTo(x, y);
      else context.moveTo(x, y);
      drawing = true;
      column = { x, low: y, high: y, last: y };
    }
    finish();
    if (dots || (xs.length === 1 && !faint)) context.fill();
    else context.stroke();
    context.globalAlpha = 1;
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event && ((event.clientX - box.left) / box.width) * this.width; // the page may show the panel enlarged
    const inside = event && x >= LEFT - 4 && x <= this.width - RIGHT + 4;
    const [low, high] = this.domain;
    this.pointer = inside
      ? Math.min(high, Math.max(low, low + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (high - low)))
      : null;
    this.tip.hidden = true;
    this.draw();
  }

  crosshair(context, style) {
    const told = this.describe(this.pointer);
    if (!told) return;
    const x = Math.round(this.x(told.x)) + 0.5;
    context.strokeStyle = style.getPropertyValue("--vl-faint");
    stroke(context, x, TOP, x, this.height - BOTTOM);
    for (const { y, colour } of told.points ?? []) {
      if (y === null || (this.logarithmic && y <= 0)) continue;
      context.fillStyle = resolved(style, colour);
      context.beginPath();
      context.arc(x, this.y(y), 3, 0, 2 * Math.PI);
      context.fill();
    }
    this.tip.replaceChildren(
      ...told.texts.map(([colour, text]) =>
        element("div", {}, colour ? element("i", { style: { background: colour } }) : null, text),
      ),
    );
    this.tip.hidden = false;
    const right = x > this.width / 2;
    Object.assign(this.tip.style, {
      left: right ? "auto" : `${x + 10}px`,
      right: right ? `${this.width - x + 10}px` : "auto",
    });
  }

  close() {
    this.observer.disconnect();
  }
}

/** The index of the value in ascending `values` that is nearest to `wanted`; -1 where there is none. */
export function nearest(values, wanted) {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - values[low - 1] < values[low] - wanted ? low - 1 : values.length ? low : -1;
}

function widened([low, high], logarithmic) {
  if (logarithmic) return [Math.max(low, 1e-12) / 1.15, Math.max(high, 1e-12) * 1.15];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function stroke(context, ...[x, y, to_x, to_y]) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(to_x, to_y);
  context.stroke();
}

/** A colour as the canvas takes it: var(--name) is looked up. */
export function resolved(style, colour) {
  const [, name] = /^var\((--[\w-]+)\)$/.exec(colour) ?? [];
  return name ? style.getPropertyValue(name) : colour;
}
