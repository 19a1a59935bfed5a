/** Strength over sampling progress as SVG. */

import { element, label, polyline, svg } from "./dom.mjs";
import { number } from "./values.mjs";

const [WIDTH, HEIGHT] = [320, 92];
const [LEFT, TOP, RIGHT, BOTTOM] = [38, 10, 308, 68];

/**
 * @param {[number, number][]} points (progress from 0 to 1, strength) in order
 * @returns {HTMLElement}
 */
export function curve(points) {
  const strengths = points.map(([, strength]) => strength);
  const [low, high] = [Math.min(0, ...strengths), Math.max(0, ...strengths)];
  const x = (progress) => LEFT + (RIGHT - LEFT) * progress;
  const y = (strength) => BOTTOM - ((BOTTOM - TOP) * (strength - low)) / (high - low || 1);
  const said = points.map(([at, strength]) => `${number(strength)} at ${percent(at)}`).join(", ");
  const root = svg("svg", { class: "schedule", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  root.append(svg("title", {}, `Strength over sampling: ${said}`));
  for (const value of new Set([low, 0, high])) {
    root.append(svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }));
    root.append(label(LEFT - 5, y(value) + 3, number(value), "end"));
  }
  for (const [at, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    root.append(label(x(at), BOTTOM + 12, percent(at), anchor));
  }
  // Before the first point and after the last one the strength stays.
  const [first, last] = [points[0], points[points.length - 1]];
  const line = [[0, first[1]], ...points, [1, last[1]]].map(([at, value]) => [x(at), y(value)]);
  root.append(polyline("line", line));
  for (const [at, strength] of points) {
    const dot = svg("circle", { cx: x(at), cy: y(strength), r: 2.5 });
    dot.append(svg("title", {}, `strength ${number(strength)} at ${percent(at)} of sampling`));
    root.append(dot);
  }
  root.append(label(LEFT, HEIGHT - 2, "strength over sampling progress", "start", "line"));
  return element("div", "plot", root);
}

function percent(share) {
  return `${number(100 * share)} %`;
}
