/** The learning rate over a run as SVG. */

import { element, label, polyline, svg } from "./dom.mjs";
import { number } from "./values.mjs";

const [WIDTH, HEIGHT] = [320, 84];
const [LEFT, TOP, RIGHT, BOTTOM] = [46, 8, 312, 58];

/**
 * @param {[number, number][]} points (step, learning rate) in order
 * @returns {HTMLElement}
 */
export function rates(points) {
  const high = Math.max(...points.map(([, rate]) => rate)) || 1;
  const [first, last] = [points[0][0], points[points.length - 1][0]];
  const x = (step) => LEFT + ((RIGHT - LEFT) * (step - first)) / (last - first || 1);
  const y = (rate) => BOTTOM - ((BOTTOM - TOP) * rate) / high;
  const root = svg("svg", { class: "rates", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const [start, end] = [points[0][1], points[points.length - 1][1]].map(number);
  root.append(svg("title", {}, `Learning rate from ${start} to ${end}, at most ${number(high)}`));
  for (const share of [0, 0.5, 1]) {
    const at = y(high * share);
    root.append(svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: at, y2: at }));
    root.append(label(LEFT - 4, at + 3, share ? (high * share).toExponential(1) : "0", "end"));
  }
  root.append(label(LEFT, BOTTOM + 11, String(first), "start"));
  root.append(label(RIGHT, BOTTOM + 11, String(last), "end"));
  root.append(polyline("line", points.map(([step, rate]) => [x(step), y(rate)])));
  root.append(label(LEFT, HEIGHT - 2, "learning rate over steps", "start", "line"));
  return element("div", "plot", root);
}
