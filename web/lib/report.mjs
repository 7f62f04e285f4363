// Reports under nodes: ComfyUI shows such texts without their indents, breaks words anywhere and lets the next text replace the first.
import { element } from "./dom.mjs";
import { nodeById } from "./graph.mjs";
import { on } from "./server.mjs";

const NAME = "$$node-text-preview"; // of ComfyUI's own widget, in whose place ours stands
const LINE = 17; // pixels
const MOST = 14; // lines that are shown without scrolling

/** Show the texts of our nodes in widgets of our own. */
export function followReports() {
  on("progress_text", ({ nodeId, text }) => {
    const node = nodeById(nodeId);
    if (!node?.comfyClass?.startsWith("VideoLoRA")) return;
    reportOf(node).value = text;
  });
}

/** For a node whose panel shows what its texts say: they are taken in and not shown. */
export function hideReports(node) {
  const widget = added(node);
  widget.hidden = widget.options.hidden = true;
}

/** Our widget in the node, made when the first text comes. */
function reportOf(node) {
  const found = node.widgets?.find(({ name }) => name === NAME);
  if (found?.element?.classList.contains("vl-report")) return found;
  if (found) node.removeWidget(found);
  return added(node);
}

function added(node) {
  const report = element("pre", { class: "videolora vl-report", "data-capture-wheel": "true" });
  let shown = "";
  let height = LINE;
  const widget = node.addDOMWidget(NAME, "videolora", report, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getValue: () => shown,
    setValue: (text) => {
      shown = String(text ?? "");
      report.textContent = shown.trimEnd();
      const needed = Math.min(MOST, report.textContent.split("\n").length) * LINE + 36;
      if (needed <= height || widget.hidden) return;
      height = needed;
      report.style.minHeight = `${height - 20}px`;
      node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    },
  });
  widget.serialize = false;
  return widget;
}
