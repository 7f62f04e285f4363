// What training will see, in the preview node: buckets with windows of clips, where these lie in the clips, what is left out.
import { app } from "../../../scripts/app.js";
import { addPanel, element, number } from "./dom.mjs";
import { fileUrl } from "./server.mjs";

const HEIGHT = 420;
const WIDTH = 620;
const TYPE = "VideoLoRADatasetPreview";
const COLOURS = ["--vl-first", "--vl-third", "--vl-second", "--vl-fourth", "--vl-fifth", "--vl-sixth"]; // of windows by length
const LANE = 8; // pixels
const MOST_LANES = 6;
const panels = new WeakMap();

export function addDatasetPanel(node) {
  const root = element("div", { class: "vl-data" }, element("span", { class: "vl-faint" }, "Run this node to see what training will see."));
  addPanel(node, "preview", root, { height: HEIGHT, width: WIDTH });
  panels.set(node, root);
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    show(root, output);
  };
}

/** Show outputs that ComfyUI has kept. */
export function showDataset(outputs) {
  for (const node of app.rootGraph?.nodes ?? []) if (node.comfyClass === TYPE && panels.has(node)) show(panels.get(node), outputs[node.id]);
}

function show(root, output) {
  const seen = output?.videolora_data?.[0];
  if (!seen) return;
  const sheet = element("a", { class: "vl-link", href: fileUrl(seen.sheet), target: "_blank" }, "the whole contact sheet");
  root.replaceChildren(...seen.sets.map(set), sheet);
}

function set({ title, buckets, clips, more_clips, left_out }) {
  const lengths = [...new Set(clips.flatMap(({ windows }) => windows.map(([, count]) => count)))].sort((a, b) => a - b);
  const colour = (count) => `var(${COLOURS[lengths.indexOf(count) % COLOURS.length]})`;
  const longest = Math.max(1, ...clips.map(({ frames }) => frames));
  return element("section", {},
    element("h4", {}, title),
    ...left_out.map((problem) => element("div", { class: "vl-wrong" }, `left out: ${problem}`)),
    ...buckets.map(({ text, windows }) => element("div", {},
      element("div", { class: "vl-faint vl-bucket" }, text),
      element("div", { class: "vl-windows" }, ...windows.map(sample)))),
    ...(clips.length ? [
      element("div", { class: "vl-row vl-faint vl-bucket" }, "Where the windows lie in the clips",
        ...lengths.map((count) => element("span", {}, element("i", { style: { background: colour(count) } }), `${number(count)} frames`))),
      element("div", { class: "vl-clips" }, ...clips.flatMap((clip) => line(clip, longest, colour))),
      more_clips ? element("div", { class: "vl-faint" }, `and ${number(more_clips)} more clips`) : null,
    ] : []));
}

/** A window of a clip: its first frame; the pointer moves through the others. */
function sample({ strip, frames, width, height, name, caption, window }) {
  const place = window ? `frames ${window[0]} to ${window[0] + window[1] - 1}` : "";
  const picture = element("div", { class: "vl-strip", role: "img", "aria-label": name, style: {
    width: `${width}px`, height: `${height}px`, backgroundImage: `url("${fileUrl(strip)}")`, backgroundSize: `${frames * width}px ${height}px` } },
    frames > 1 ? element("div", { class: "vl-mark" }) : null);
  const at = (share) => {
    const frame = Math.min(frames - 1, Math.max(0, Math.floor(share * frames)));
    picture.style.backgroundPositionX = `${-frame * width}px`;
    if (picture.firstChild) Object.assign(picture.firstChild.style, { width: `${100 / frames}%`, left: `${(100 * frame) / frames}%` });
  };
  picture.addEventListener("pointermove", ({ clientX }) => {
    const box = picture.getBoundingClientRect();
    at((clientX - box.left) / box.width);
  });
  picture.addEventListener("pointerleave", () => at(0));
  at(0);
  return element("figure", { title: `${name} ${place}\n${caption}`, style: { width: `${Math.max(width, 150)}px` } }, picture,
    element("figcaption", {}, element("div", {}, name, element("span", { class: "vl-faint" }, place ? ` ${place}` : "")), element("div", { class: "vl-faint vl-caption-text" }, caption)));
}

/** A clip as a bar as long as itself, with its windows; those that overlap lie under each other. */
function line({ name, frames, windows }, longest, colour) {
  const ends = [];
  const marks = windows.map(([start, count]) => {
    let lane = ends.findIndex((end) => end <= start);
    if (lane < 0) lane = Math.min(ends.length, MOST_LANES - 1);
    ends[lane] = start + count;
    return element("div", { title: `frames ${start} to ${start + count - 1}`, style: { left: `${(100 * start) / frames}%`, width: `${(100 * count) / frames}%`, top: `${2 + lane * LANE}px`, background: colour(count) } });
  });
  const bar = element("div", { class: "vl-clip", style: { width: `${(100 * frames) / longest}%`, height: `${Math.max(1, ends.length) * LANE + 3}px` } }, ...marks);
  return [element("span", { title: name }, name), element("div", {}, bar), element("span", { class: "vl-faint" }, `${windows.length} in ${number(frames)} frames`)];
}
