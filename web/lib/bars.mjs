/** The norm of an adapter's change by block as SVG. */

import { element, label, svg } from "./dom.mjs";
import { number } from "./values.mjs";

const [WIDTH, HEIGHT] = [320, 110];
const [LEFT, TOP, RIGHT, BOTTOM] = [38, 10, 316, 84];
const WIDEST = 40;

/**
 * @param {[string, number | null][]} given (block, norm) in the order of the model
 * @returns {HTMLElement | null} null where no norm is a number
 */
export function bars(given) {
  const norms = given.filter(([, norm]) => Number.isFinite(norm));
  if (!norms.length) return null;
  const high = Math.max(...norms.map(([, norm]) => norm)) || 1;
  const kinds = norms.map(([block]) => block.replace(/\.\d+$/, ""));
  const changes = kinds.filter((kind, i) => i && kind !== kinds[i - 1]).length;
  const step = Math.min((RIGHT - LEFT) / (norms.length + changes), WIDEST);
  const root = svg("svg", { class: "bars", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  root.append(svg("title", {}, "Norm of the change by block"));
  for (const share of [0, 0.5, 1]) {
    const y = BOTTOM - (BOTTOM - TOP) * share;
    root.append(svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y, y2: y }));
    root.append(label(LEFT - 4, y + 3, number(high * share), "end"));
  }
  let [x, run] = [LEFT, 0];
  norms.forEach(([block, norm], i) => {
    if (i && kinds[i] !== kinds[i - 1]) [x, run] = [x + step, run + 1];
    const tall = ((BOTTOM - TOP) * norm) / high;
    const place = { x, y: BOTTOM - tall, width: Math.max(step * 0.8, 0.5), height: tall };
    const bar = svg("rect", { class: run % 2 ? "odd" : "even", ...place });
    bar.append(svg("title", {}, `${block}: ${number(norm)}`));
    root.append(bar);
    x += step;
  });
  root.append(label(LEFT, BOTTOM + 12, norms[0][0], "start"));
  if (norms.length > 1) root.append(label(x, BOTTOM + 12, norms[norms.length - 1][0], "end"));
  root.append(label(LEFT, HEIGHT - 2, "norm of the change by block", "start", "line"));
  return element("div", "plot", root);
}
