// Shows the text that a node returns (ui.text) in the node, and leaves it there.
//
// ComfyUI has no widget for this that a node can ask for. The server's progress texts are taken away at the end of a job
// by frontends from 1.54.8 on, and the text widget of the core node "Preview as Text" is added by the page to that node
// alone. This adds one like it to the nodes of this pack, once there is a text.

import { app } from "../../../scripts/app.js";

const PREFIX = "FreqLoss_"; // the ids of this pack's nodes
const WIDGET = "freq_loss_text";
const STORED = "FreqLoss.texts";
const LINE = 12; // pixels, at the font size of 10 pixels
const CHARACTER = 6;
const MOST_LINES = 12; // of a text that is longer, the rest is scrolled

/** Show the text of a node's output; without one, as for a cached node without outputs, the last text stays. */
function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  if (!text) return;
  const widget = node.widgets?.find((each) => each.name === WIDGET) ?? addWidget(node);
  widget.value = text;
  widget.element.rows = Math.min(lineCount(node, text), MOST_LINES); // the height in Vue nodes
  node.setDirtyCanvas(true, true);
}

function addWidget(node) {
  const element = document.createElement("textarea");
  element.className = "comfy-multiline-input";
  element.readOnly = true;
  element.spellcheck = false;
  element.dataset.captureWheel = "true"; // Vue nodes: a long text scrolls
  element.addEventListener("wheel", (event) => {
    // Vue nodes zoom by themselves where there is nothing to scroll.
    if (LiteGraph.vueNodesMode || (element.scrollHeight > element.clientHeight && !event.ctrlKey)) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const height = (most) => 2 * 10 + 6 + LINE * Math.min(lineCount(node, element.value), most);
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    getValue: () => element.value,
    setValue: (value) => (element.value = value),
    getMinHeight: () => height(MOST_LINES),
    getMaxHeight: () => height(Infinity), // what is left is for pictures
    hideOnZoom: false,
    hideInPanel: true,
    serialize: false, // it is no input: it does not go into the prompt,
  });
  widget.serialize = false; // nor among the values of the widgets in a workflow
  return widget;
}

/** How many lines a text has at the node's width, roughly. */
function lineCount(node, text) {
  const width = Math.max(20, (node.size[0] - 30) / CHARACTER);
  return text.split("\n").reduce((count, line) => count + Math.max(1, Math.ceil(line.length / width)), 0);
}

/** This pack's nodes, by the names that the page has for them: ID, or SUBGRAPH:ID. */
function* ownNodes() {
  const root = app.rootGraph ?? app.graph;
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])])
    for (const node of graph?.nodes ?? [])
      if (node.type?.startsWith(PREFIX)) yield [graph === root ? `${node.id}` : `${graph.id}:${node.id}`, node];
}

function showAll(outputs) {
  for (const [name, node] of ownNodes()) show(node, outputs?.[name]);
}

// Texts are kept over a reload of the page, but not in the workflow: there, each would be a change that can be undone, and
// pictures would carry the text of the job before theirs.
addEventListener("pagehide", () => {
  const outputs = {};
  for (const [name, node] of ownNodes()) {
    const widget = node.widgets?.find((each) => each.name === WIDGET);
    if (widget) outputs[name] = { text: [widget.value] };
  }
  sessionStorage.setItem(STORED, JSON.stringify({ graph: (app.rootGraph ?? app.graph)?.id, outputs }));
});

app.registerExtension({
  name: "freqlossfrequencybandsandloras.NodeText",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },

  afterConfigureGraph() {
    const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "null");
    if (stored && stored.graph === (app.rootGraph ?? app.graph).id) showAll(stored.outputs);
  },

  /** Another workflow, an undone change, or a job out of the queue is on the page now; these are its outputs. */
  onNodeOutputsUpdated(outputs) {
    showAll(outputs);
  },
});
