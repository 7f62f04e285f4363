// Reading the graph: what is linked to a node, through reroutes and the borders of subgraphs, and which values it will get.
import { app } from "../../../scripts/app.js";

const FURTHEST = 100; // links that are followed
const MUTED = 2; // the mode of a node that is not run

/** The node that an input gets its value from, or null. */
export function source(node, input) {
  let [graph, link] = [node?.graph, node?.inputs?.find(({ name }) => name === input)?.link];
  for (let hops = 0; graph && link != null && hops < FURTHEST; hops += 1) {
    const { origin_id, origin_slot } = graph.getLink?.(link) ?? graph.links?.[link] ?? {};
    const origin = graph.getNodeById(origin_id);
    if (origin?.subgraph) {
      graph = origin.subgraph;
      link = graph.outputs[origin_slot]?.linkIds?.[0];
    } else if (origin?.type === "Reroute") {
      link = origin.inputs[0]?.link;
    } else if (origin) {
      return origin.mode === MUTED ? null : origin;
    } else {
      const host = instanceOf(graph);
      link = host?.inputs[origin_slot]?.link;
      graph = host?.graph;
    }
  }
  return null;
}

/** A node that stands for the subgraph, or undefined. */
function instanceOf(subgraph) {
  const graphs = [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes).find((node) => node.subgraph === subgraph);
}

/** The value that a widget's input will get; undefined when that shows only when it runs. */
export function value(node, name) {
  const widget = node.widgets?.find((each) => each.name === name);
  const input = node.inputs?.find((each) => each.name === name);
  if (input?.link == null) return widget?.value;
  const origin = source(node, name);
  return origin?.type.startsWith("Primitive") ? origin.widgets?.[0]?.value : undefined;
}

/** The nearest node up from `input` that is of one of these types, following inputs of that name. */
export function upstream(node, input, types) {
  for (let hops = 0; node && hops < FURTHEST; hops += 1) {
    node = source(node, input);
    if (node && types.includes(node.comfyClass)) return node;
  }
  return null;
}

/** The model that a node works with, as the server is asked about it; a text when that is not known yet. */
export function model(node) {
  const loader = upstream(node, "dit", ["VideoLoRALoadDiT", "VideoLoRALoadWanExperts"]);
  if (!loader) return "Link a model to see this.";
  const pair = loader.comfyClass === "VideoLoRALoadWanExperts";
  const file = value(loader, pair ? "high" : "model");
  if (typeof file !== "string" || !file) return "Choose a model to see this.";
  if (pair) return { model: file, expert: "high", boundary: value(loader, "boundary") ?? 0 };
  return { model: file, variant: value(loader, "variant") ?? "auto" };
}

/** Whether the id that the server has for a node, a path through subgraphs, is this node's. */
export function isNode(node, id) {
  return nodeById(id) === node;
}

/** The node of such an id, or null. */
export function nodeById(id) {
  let graph = app.rootGraph;
  let found = null;
  for (const part of String(id).split(":")) {
    found = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = found?.subgraph;
  }
  return found;
}

/** The open workflow's id, which is saved with it. */
export function workflowId() {
  return String(app.rootGraph?.id ?? "");
}
