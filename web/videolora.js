// The only file here that ComfyUI imports by itself: it does so with every *.js, and not with *.mjs.
import { app } from "../../scripts/app.js";
import { followReports } from "./lib/report.mjs";
import { addDatasetPanel, showDataset } from "./lib/dataset.mjs";
import { addMapPanel } from "./lib/map.mjs";
import { addPlanPanel, addSigmaPanel } from "./lib/schedule.mjs";
import { addTrainingPanel } from "./lib/training.mjs";

const PANELS = {
  VideoLoRATrain: addTrainingPanel,
  VideoLoRASelectLORAID: addMapPanel,
  VideoLoRAInspectLoRA: addMapPanel,
  VideoLoRAFlowSchedule: addSigmaPanel,
  VideoLoRACFGSkip: addPlanPanel,
  VideoLoRADatasetPreview: addDatasetPanel,
};

app.registerExtension({
  name: "videolora.panels",
  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./lib/panels.css", import.meta.url).href;
    document.head.append(style);
    followReports();
  },
  onNodeOutputsUpdated(outputs) {
    showDataset(outputs); // what ran before is shown again when its workflow is
  },
  nodeCreated(node) {
    PANELS[node.comfyClass]?.(node);
  },
});
