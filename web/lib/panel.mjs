/** The report of one node: a verdict, the loss curve of a training run, the text in full. */

import { chart } from "./chart.mjs";

const MARGIN = 6;
const [LINE, CHARACTER, PLOT] = [17, 6.5, 150]; // pixels, roughly
const MOST_LINES = 10;
const HINT = "Reports here after a run.";

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("panel.css", import.meta.url).href;
document.head.append(sheet);

/**
 * @typedef {object} Report what a node sends; only the text is always there
 * @property {string} text the verdict in the first line, then details
 * @property {Record<string, unknown>} [matched] modules of an adapter by name
 * @property {Record<string, string>} [unmatched] module -> why it was not applied
 * @property {string[]} [warnings]
 * @property {number[]} [losses] training loss of each step
 * @property {[number, number][]} [validation] (step, held-out loss)
 */

export class Panel {
  constructor(node) {
    this.node = node;
    this.element = element("div", "adapter-lab-report");
    // The wheel scrolls a panel that was clicked, and zooms the canvas otherwise.
    this.element.tabIndex = 0;
    this.element.dataset.captureWheel = "true";
    // Ctrl+C copies nodes unless the event stays here.
    this.element.addEventListener("copy", (event) => event.stopPropagation());
    const widget = node.addDOMWidget("report", "adapter_lab_report", this.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
    });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], 340), node.size[1]]);
    this.show();
  }

  /** @param {Report[]} [reports] several when the node ran on a list; none clears the panel */
  show(reports) {
    if (!reports?.length) return this.#fill([element("div", "hint", HINT)], HINT);
    const plots = reports.filter((one) => one.losses?.length).length;
    const text = reports.map((one) => one.text + (one.unmatched ? "\nAll" : "")).join("\n");
    this.#fill(reports.flatMap(parts), text, plots);
  }

  /** @param {string} message of the error that ended the node's run */
  fail(message) {
    this.#fill([verdict(message.trim(), "failed")], message.trim());
  }

  /** Shows `children`, with room for `text` and `plots`. Vue lays out by CSS, the canvas is told. */
  #fill(children, text, plots = 0) {
    const room = (this.node.size[0] - 40) / CHARACTER;
    const lines = text.split("\n").reduce((sum, line) => sum + Math.ceil(line.length / room), 0);
    this.height = 10 + LINE * Math.min(lines, MOST_LINES) + PLOT * plots;
    this.element.style.setProperty("--comfy-widget-min-height", `${this.height}px`);
    this.element.replaceChildren(...children);
    const [width, least] = this.node.computeSize();
    if (!window.LiteGraph.vueNodesMode && this.node.size[1] < least) {
      this.node.setSize([Math.max(width, this.node.size[0]), least]);
    }
  }
}

/** @param {Report} report */
function parts(report) {
  const [first, ...rest] = report.text.split("\n");
  const details = rest.join("\n").trim();
  const missed = Object.entries(report.unmatched ?? {});
  return [
    verdict(first, state(report, missed.length)),
    report.losses?.length ? chart(report.losses, report.validation ?? []) : "",
    details ? element("pre", "", details) : "",
    missed.some(([name]) => !details.includes(name)) ? list(missed) : "",
  ].filter(Boolean);
}

function state(report, missed) {
  if (!report.matched) return "plain";
  if (!Object.keys(report.matched).length) return "failed";
  return missed || report.warnings?.length ? "partly" : "all";
}

function verdict(text, kind) {
  return element("div", `verdict ${kind}`, text);
}

/** Every module by name, folded, where the text has them in groups. */
function list(missed) {
  const folded = element("details");
  folded.append(element("summary", "", `All ${missed.length} modules that were not applied`));
  for (const [name, reason] of missed) {
    const row = element("div", "missed");
    row.append(element("code", "", name), `: ${reason}`);
    folded.append(row);
  }
  return folded;
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}
