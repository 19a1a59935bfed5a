/** The widget that holds a node's reports and asks for the room they need. */

import { element } from "./dom.mjs";
import { Live } from "./live.mjs";
import { render, verdict } from "./report.mjs";

const MARGIN = 6;
// Pixels: the height of a folded report, the most that is asked for by text alone, by more than text
// and by what the user opened, and the width for a table that the user opened.
const [LINE, TEXT, MOST, OPENED, WIDE] = [30, 180, 260, 360, 560];
const HINT = "Reports here after a run.";

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("panel.css", import.meta.url).href;
document.head.append(sheet);

export class Panel {
  constructor(node) {
    this.node = node;
    this.height = LINE;
    /** Reports that the user opened or folded, by position. @type {Map<number, boolean>} */
    this.chosen = new Map();
    /** The node's size before the user opened a report, and that to go to. @type {number[] | null} */
    this.before = this.after = null;
    /** The run that is going on, or that ended without a report. @type {Live | null} */
    this.live = null;
    this.element = element("div", "adapter-lab-report");
    // The wheel scrolls a panel that was clicked, and zooms the canvas otherwise.
    this.element.dataset.captureWheel = "true";
    // Ctrl+C copies nodes and the space bar pans the canvas unless the event stays here.
    for (const kind of ["copy", "keydown", "keyup"]) {
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    }
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

  /** @param {import("./report.mjs").Report[]} [reports] several when the node ran on a list */
  show(reports) {
    this.live = null;
    this.#fill((view) =>
      reports?.length
        ? reports.map((report, i) => this.#foldable(render(report, view), i))
        : [element("div", "hint", HINT)],
    );
  }

  /** @param {string} message of the error that ended the node's run */
  fail(message) {
    const seen = this.live ? [this.live.element] : [];
    this.#fill(() => [verdict(message.trim(), "failed"), ...seen]);
  }

  /** @param {import("./live.mjs").State} state of a run after a step */
  train(state) {
    this.#live().update(state);
  }

  /** @param {import("./pictures.mjs").Preview} preview */
  preview(preview) {
    this.#live().picture(preview);
  }

  #live() {
    if (!this.live) {
      this.live = new Live();
      this.#fill(() => [this.live.element]);
    }
    return this.live;
  }

  /** Keeps what the user chose over the next runs, and gives room back on folding. */
  #foldable(made, i) {
    if (made.tagName !== "DETAILS") return made;
    made.open = this.chosen.get(i) ?? made.open;
    made.firstChild.addEventListener("click", (event) => {
      if (event.defaultPrevented) return;
      this.chosen.set(i, !made.open);
      const [width, height] = this.node.size;
      if (made.open) {
        this.after = this.before ?? [width, 0];
        this.before = null;
      } else {
        this.before = [width, height];
        if (made.querySelector("table")) this.node.setSize([Math.max(width, WIDE), height]);
      }
    });
    return made;
  }

  #fill(content) {
    const [view, inner] = [element("div", "view"), element("div", "reports")];
    view.tabIndex = 0;
    inner.append(...content(view));
    view.append(inner);
    this.element.replaceChildren(view);
    new ResizeObserver(() => this.#fit(inner)).observe(inner);
  }

  /** Asks for room. Vue lays out by CSS, the canvas is told. */
  #fit(inner) {
    if (!inner.offsetHeight) return; // not on the screen
    const most = inner.querySelector("svg, table, dl, figure") ? MOST : TEXT;
    const room = [...this.chosen.values()].includes(true) ? OPENED : most;
    this.height = Math.max(LINE, Math.min(inner.offsetHeight, room));
    this.element.style.setProperty("--comfy-widget-min-height", `${this.height}px`);
    const [width, height] = this.node.computeSize();
    const [wide, high] = this.after ?? this.node.size;
    const grows = !window.LiteGraph.vueNodesMode && high < height;
    if (grows || this.after) {
      this.node.setSize([Math.max(width, wide), Math.max(height, high)]);
      this.node.graph?.setDirtyCanvas(true, true);
    }
    this.after = null;
  }
}
