/** What a sampling run with MagCache computed and skipped, as SVG. */

import { element, label, svg } from "./dom.mjs";

const WIDTH = 320;
const [LEFT, RIGHT, TOP, ROW, TALL] = [44, 316, 4, 19, 14];
const LOW = 2; // height of a skipped step
const GAP = 0.15; // of a cell's width

/**
 * @typedef {object} Run
 * @property {string} headline
 * @property {string} off why nothing was skipped, "" if something was to be
 * @property {boolean} calibrating
 * @property {boolean} stopped before its end
 * @property {number} skipped evaluations
 * @property {string[]} notes
 * @property {[string, string][]} facts (name, value)
 * @property {number} schedule steps of the whole schedule
 * @property {Record<string, Cell[]>} strip by branch, in the order of sampling
 *
 * @typedef {[number, number, number, number, string]} Cell step (counted from 1; between two
 *   steps a fraction), noise level, evaluations skipped, evaluations, why the others were computed
 */

/**
 * A row a branch, a cell a noise level: high where it was computed, low where it was skipped, in
 * between where only some of its evaluations were.
 *
 * @param {Run} run
 * @returns {HTMLElement | null} null where nothing was evaluated
 */
export function strip(run) {
  const rows = Object.entries(run.strip);
  if (!rows.length) return null;
  const bottom = TOP + ROW * rows.length;
  const height = bottom + 26;
  const root = svg("svg", { class: "strip", viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  root.append(svg("title", {}, `${run.headline}. ${rows.map(summary).join(". ")}`));
  rows.forEach(([branch, cells], i) => {
    const floor = TOP + ROW * i + TALL;
    root.append(label(LEFT - 5, floor - 3, branch, "end"));
    root.append(svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: floor, y2: floor }));
    const step = (RIGHT - LEFT) / cells.length;
    cells.forEach((cell, at) => root.append(bar(cell, LEFT + step * at, floor, step)));
  });
  const cells = rows[0][1];
  const [first, last] = [cells[0], cells[cells.length - 1]].map(([step]) => Math.floor(step));
  root.append(label(LEFT, bottom + 6, `step ${first}`, "start"));
  root.append(label(RIGHT, bottom + 6, `${last} of ${run.schedule}`, "end"));
  root.append(label(LEFT, height - 4, "computed", "start", "computed"));
  root.append(label(LEFT + 50, height - 4, "skipped", "start", "skipped"));
  return element("div", "plot", root);
}

function bar(cell, x, floor, step) {
  const [, , skipped, all] = cell;
  const share = 1 - skipped / all;
  const kind = share === 0 ? "skipped" : share === 1 ? "computed" : "partly";
  const height = LOW + (TALL - LOW) * share;
  const place = { x, y: floor - height, width: Math.max(step * (1 - GAP), 0.5), height };
  const made = svg("rect", { class: kind, ...place });
  made.append(svg("title", {}, told(cell)));
  return made;
}

/** @param {Cell} cell */
function told([step, sigma, skipped, all, reason]) {
  const place = `step ${step}, sigma ${sigma}`;
  if (skipped === all) return `${place}: skipped`;
  const what = skipped ? `${skipped} of ${all} evaluations skipped` : "computed";
  return `${place}: ${what}${reason && `, ${reason}`}`;
}

function summary([branch, cells]) {
  const computed = cells.filter(([, , skipped, all]) => skipped < all).length;
  return `${branch}: ${computed} of ${cells.length} computed`;
}
