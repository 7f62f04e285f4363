// What Flow Schedule and CFG Skip will do, drawn while their values are changed; the server computes it as the nodes do.
import { Chart, nearest } from "./chart.mjs";
import { addPanel, element, number, whenRemoved } from "./dom.mjs";
import { model, source, upstream, value } from "./graph.mjs";
import { hideReports } from "./report.mjs";
import { watch } from "./server.mjs";

const LATER = "A value comes from another node: this is drawn when it runs.";

/** The sigma curve in Flow Schedule. */
export function addSigmaPanel(node) {
  hideReports(node);
  const caption = element("div", { class: "vl-caption" });
  let shown = null;
  const chart = new Chart({
    label: "Sigma of each step", height: 130,
    describe: (x) => {
      const at = nearest(shown?.sigmas.map((_, step) => step) ?? [], x);
      if (at < 0) return null;
      const last = at === shown.sigmas.length - 1;
      return {
        x: at, points: [{ y: shown.sigmas[at], colour: "var(--vl-first)" }],
        texts: [[null, last ? "the end" : `step ${at + 1}`], ["var(--vl-first)", `sigma ${number(shown.sigmas[at])}`]],
      };
    },
  });
  const draw = (answer, problem) => {
    shown = answer;
    caption.replaceChildren(...(answer ? [
      element("b", {}, `flow shift ${number(answer.shift)}`),
      element("span", { class: "vl-faint" }, answer.recommended ? ` recommended for ${answer.model}` : ` chosen, for ${answer.model}`),
    ] : [element("span", { class: "vl-faint" }, problem)]));
    const xs = answer?.sigmas.map((_, step) => step) ?? [];
    chart.show({
      lines: answer ? [{ xs, ys: answer.sigmas, colour: "var(--vl-first)", width: 2 },
        ...(xs.length <= 60 ? [{ xs, ys: answer.sigmas, colour: "var(--vl-first)", dots: true }] : [])] : [],
      domain: [0, Math.max(1, xs.length - 1)], span: [0, 1],
      marks: answer?.boundary ? [{ y: answer.boundary, text: `above ${number(answer.boundary)}: high noise` }] : [],
    });
  };
  follow(node, chart, element("div", { class: "vl-sigmas" }, caption, chart.root), "sigmas", 190, () => asked(node), draw);
}

/** CFG Skip's plan: a mark per step, filled where guidance works. */
export function addPlanPanel(node) {
  hideReports(node);
  const caption = element("div", { class: "vl-caption" });
  const cells = element("div", { class: "vl-plan", role: "img" });
  const letters = element("div", { class: "vl-letters vl-faint" });
  const draw = (answer, problem) => {
    const plan = answer?.plan ?? "";
    const applied = [...plan].filter((letter) => letter === "A").length;
    caption.replaceChildren(...(answer ? [
      element("b", {}, `guidance in ${applied} of ${plan.length} steps`),
      element("span", { class: "vl-faint" }, ` up to ${number((100 * (plan.length - applied)) / (2 * plan.length), 2)} % less time`),
    ] : [element("span", { class: "vl-faint" }, problem)]));
    cells.setAttribute("aria-label", plan);
    cells.replaceChildren(...[...plan].map((letter, step) =>
      element("div", { class: letter === "A" ? "vl-on" : "", title: `step ${step + 1}, sigma ${number(answer.sigmas[step])}: ${letter === "A" ? "with guidance, two passes" : "without, one pass"}` })));
    letters.textContent = plan;
  };
  const question = () => {
    const schedule = upstream(node, "schedule", ["VideoLoRAFlowSchedule"]);
    if (!schedule) return "Link a Flow Schedule to see the plan.";
    const [mode, ratio, question] = [value(node, "mode"), value(node, "ratio"), asked(schedule)];
    if (mode === undefined || ratio === undefined) return LATER;
    return typeof question === "string" ? question : { ...question, cfg_skip: mode, cfg_ratio: ratio };
  };
  follow(node, null, element("div", {}, caption, cells, letters), "plan", 96, question, draw);
}

function follow(node, chart, root, name, height, question, draw) {
  addPanel(node, name, root, { height });
  const end = watch("/videolora/schedule", question, draw);
  whenRemoved(node, () => {
    end();
    chart?.close();
  });
}

/** What the server is asked of a Flow Schedule; a text when it cannot be asked. */
function asked(schedule) {
  const opened = model(schedule);
  if (typeof opened === "string") return opened;
  const [steps, shift, solver] = ["steps", "shift", "solver"].map((name) => value(schedule, name));
  if ([steps, shift, solver].includes(undefined)) return LATER;
  return { ...opened, steps, shift, solver, size: sizeOf(schedule) };
}

/** [frames, height, width] of the video that is linked, where its node says it. */
function sizeOf(schedule) {
  const latent = source(schedule, "latent");
  const sides = latent && ["frames", "height", "width"].map((name) => value(latent, name));
  return sides?.every(Number.isInteger) ? sides : null;
}
