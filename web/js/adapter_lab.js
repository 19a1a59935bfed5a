/** Shows on each Adapter Lab node what it reported in its last run. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Panel } from "../lib/panel.mjs";

/** Classes of ours whose results the server sends. @type {Set<string>} */
const reporting = new Set();
/** @type {WeakMap<object, Panel>} */
const panels = new WeakMap();
/** Nodes whose run has steps left after the job that is being executed. @type {Set<object>} */
const continuing = new Set();

/** The key of a node's results: its id, after its subgraph's where it is in one. */
function locator(node) {
  return node.graph === app.rootGraph ? String(node.id) : `${node.graph.id}:${node.id}`;
}

function* everyNode() {
  for (const graph of [app.rootGraph, ...app.rootGraph.subgraphs.values()]) yield* graph.nodes;
}

/** The node that an execution path such as "12:3" ends at: node 3 in the subgraph of node 12. */
function nodeAt(path) {
  return path.split(":").reduce((at, id) => (at?.subgraph ?? at)?.getNodeById(id), app.rootGraph);
}

/** Takes away the line of progress that ComfyUI leaves below a node whose run has ended. */
function forgetProgress(node) {
  const line = node.widgets.find((widget) => widget.type === "progressText");
  if (line) node.removeWidget(line);
}

app.registerExtension({
  name: "adapter_lab.report",

  beforeRegisterNodeDef(_, definition) {
    const reports = definition.output_node || definition.has_intermediate_output;
    if (reports && definition.name.startsWith("AdapterLab")) reporting.add(definition.name);
  },

  nodeCreated(node) {
    if (!reporting.has(node.comfyClass)) return;
    const panel = new Panel(node);
    const before = node.onExecuted;
    panels.set(node, panel);
    node.onExecuted = function (output) {
      before?.call(this, output);
      forgetProgress(node);
      panel.show(output.adapter_lab);
      if (output.adapter_lab?.some((report) => report.continues)) continuing.add(node);
    };
  },

  /** Undo builds the nodes anew, and the results are still there. */
  loadedGraphNode(node) {
    panels.get(node)?.show(app.nodeOutputs[locator(node)]?.adapter_lab);
  },

  /** Back from another workflow's tab, or opened from the queue. */
  onNodeOutputsUpdated(outputs) {
    for (const node of everyNode()) panels.get(node)?.show(outputs[locator(node)]?.adapter_lab);
  },

  setup() {
    api.addEventListener("adapter_lab.training", ({ detail }) => {
      panels.get(nodeAt(String(detail.node)))?.train(detail);
    });
    api.addEventListener("adapter_lab.preview", ({ detail }) => {
      panels.get(nodeAt(String(detail.node)))?.preview(detail);
    });
    // A run in chunks goes on behind whatever was queued meanwhile.
    api.addEventListener("execution_success", () => {
      const again = continuing.size > 0;
      continuing.clear();
      if (again) app.queuePrompt(0, 1);
    });
    api.addEventListener("execution_interrupted", ({ detail }) => {
      continuing.clear();
      const panel = panels.get(nodeAt(String(detail.node_id)));
      if (panel?.live) panel.fail("Cancelled. What was learned is saved; queue again to go on.");
    });
    // A report of an earlier run beside an error of this one would mislead.
    api.addEventListener("execution_error", ({ detail }) => {
      continuing.clear();
      panels.get(nodeAt(String(detail.node_id)))?.fail(detail.exception_message);
    });
  },
});
