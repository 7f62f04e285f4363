// Making elements, and putting a panel into a node.

const SVG = "http://www.w3.org/2000/svg";

/** An element: properties and listeners by name, `class` and other attributes too; children are elements or texts. */
export function element(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

/** The same for SVG. */
export function shape(name, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, name), properties, children);
}

function filled(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style" && typeof value === "object") Object.assign(made.style, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/**
 * Put a panel into a node, below its widgets, in the classic and in the Vue rendering.
 * It is neither saved with the workflow nor sent with the prompt. `width` is what a new node gets at least.
 */
export function addPanel(node, name, panel, { height, width = 0 }) {
  panel.classList.add("videolora");
  panel.style.minHeight = `${height}px`;
  panel.dataset.captureWheel = "true"; // panels that are longer than their place scroll
  panel.addEventListener("wheel", (event) => panel.scrollHeight > panel.clientHeight + 1 && event.stopPropagation());
  const widget = node.addDOMWidget(name, "videolora", panel, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false;
  const [least, least_height] = node.computeSize();
  node.setSize([Math.max(node.size[0], least, width), Math.max(node.size[1], least_height)]);
  return widget;
}

/** Call `done` when the node goes. */
export function whenRemoved(node, done) {
  const before = node.onRemoved;
  node.onRemoved = function (...words) {
    done();
    return before?.apply(this, words);
  };
}

/** 1234567 -> "1,234,567"; 0.000123 -> "1.2e-4"; what is no number -> "–". */
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Seconds as 1:02:03. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const two = (part) => String(part).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}
