// Shows the text that a node returns (ui.text) permanently in the node.
//
// ComfyUI offers nodes no widget for this. Frontends from 1.54.8 on remove the server's progress texts at the end of a
// job, and they add the text widget of the core node "Preview as Text" to that node only. This script adds a similar one
// to the nodes of this pack, once there is a text.

import { app } from "../../../scripts/app.js";

const PREFIX = "FreqLoss_"; // the ids of this pack's nodes
const WIDGET = "freq_loss_text";
const STORED = "FreqLoss.texts";
const LINE = 12; // pixels, at the font size of 10 pixels
const CHARACTER = 6;
const MAX_LINES = 12; // longer texts scroll

/** Show the text of a node's output; without one, as for a cached node without outputs, the last text stays. */
function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  if (!text) return;
  const widget = node.widgets?.find((widget) => widget.name === WIDGET) ?? addWidget(node);
  widget.value = text;
  widget.element.rows = Math.min(lineCount(node, text), MAX_LINES); // the height in Vue nodes
  node.setDirtyCanvas(true, true);
}

function addWidget(node) {
  const element = document.createElement("textarea");
  element.className = "comfy-multiline-input";
  element.readOnly = true;
  element.spellcheck = false;
  element.dataset.captureWheel = "true"; // Vue nodes: a long text scrolls
  element.addEventListener("wheel", (event) => {
    // Vue nodes zoom by themselves if there is nothing to scroll.
    if (LiteGraph.vueNodesMode || (element.scrollHeight > element.clientHeight && !event.ctrlKey)) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const height = (maxLines) => 2 * 10 + 6 + LINE * Math.min(lineCount(node, element.value), maxLines);
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    getValue: () => element.value,
    setValue: (value) => (element.value = value),
    getMinHeight: () => height(MAX_LINES),
    getMaxHeight: () => height(Infinity), // leaves the rest of the node to images
    hideOnZoom: false,
    hideInPanel: true,
    serialize: false, // not an input: it is not part of the prompt,
  });
  widget.serialize = false; // nor of the widget values in a workflow
  return widget;
}

/** The approximate number of lines of a text at the node's width. */
function lineCount(node, text) {
  const width = Math.max(20, (node.size[0] - 30) / CHARACTER);
  return text.split("\n").reduce((count, line) => count + Math.max(1, Math.ceil(line.length / width)), 0);
}

/** This pack's nodes and the keys of their outputs: ID, or SUBGRAPH:ID. */
function* ownNodes() {
  const root = app.rootGraph ?? app.graph;
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])])
    for (const node of graph?.nodes ?? [])
      if (node.type?.startsWith(PREFIX)) yield [graph === root ? `${node.id}` : `${graph.id}:${node.id}`, node];
}

function showAll(outputs) {
  for (const [name, node] of ownNodes()) show(node, outputs?.[name]);
}

// Texts survive a reload of the page, but are not saved in the workflow: there, every text would be a change to undo, and
// saved images would contain the text of the previous job.
addEventListener("pagehide", () => {
  const outputs = {};
  for (const [name, node] of ownNodes()) {
    const widget = node.widgets?.find((widget) => widget.name === WIDGET);
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

  /** The page now shows another workflow, an undone change, or a finished job; these are its outputs. */
  onNodeOutputsUpdated(outputs) {
    showAll(outputs);
  },
});
