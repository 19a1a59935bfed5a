/** The loss curve of a training run as SVG. */

import { element, label, polyline, svg } from "./dom.mjs";
import { number } from "./values.mjs";

const [WIDTH, HEIGHT] = [320, 140];
const [LEFT, TOP, RIGHT, BOTTOM] = [38, 8, 312, 108];
const POINTS = 400;

/**
 * Training loss faintly, its mean on top, held-out loss as dots. What is not finite is left out.
 *
 * @param {[number, number | null][]} losses (step, loss of its batch)
 * @param {[number, number | null][]} heldOut (step, held-out loss)
 * @param {object} [more]
 * @param {[number, number | null][]} [more.means] (step, mean loss), over the last 5 % of the steps
 *   if not given
 * @param {number} [more.steps] that the run will have; those that it has if not given
 * @returns {HTMLElement}
 */
export function chart(losses, heldOut, { means: given, steps = losses.length } = {}) {
  const known = losses.filter(isKnown);
  const validation = heldOut.filter(isKnown);
  const batches = thin(known);
  const window = Math.max(1, Math.floor(known.length / 20));
  const means = thin(given?.filter(isKnown) ?? runningMean(known, window));
  // The range of what is to be read: single batches may leave the picture.
  const shown = [...means, ...validation].map(([, loss]) => loss);
  let [low, high] = shown.length ? [Math.min(...shown), Math.max(...shown)] : [0, 1];
  const pad = 0.15 * (high - low) || 0.1 * Math.abs(high) || 1;
  [low, high] = [low < 0 ? low - pad : Math.max(0, low - pad), high + pad];
  const x = (step) => LEFT + ((RIGHT - LEFT) * step) / steps;
  const y = (loss) =>
    Math.min(Math.max(BOTTOM - ((BOTTOM - TOP) * (loss - low)) / (high - low), TOP), BOTTOM);
  const line = (name, points) =>
    polyline(name, points.map(([step, loss]) => [x(step), y(loss)]));

  const root = svg("svg", { class: "loss", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  root.append(svg("title", {}, summary(losses.length, means, validation)));
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const value = low + (high - low) * share;
    root.append(svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }));
    root.append(label(LEFT - 4, y(value) + 3, value.toPrecision(3), "end"));
  }
  for (const share of [0, 0.5, 1]) {
    const step = Math.round(steps * share);
    root.append(label(x(step), BOTTOM + 12, String(step), share === 1 ? "end" : "middle"));
  }
  root.append(line("batch", batches), line("mean", means), line("held-out", validation));
  for (const [step, loss] of validation) {
    const dot = svg("circle", { class: "held-out", cx: x(step), cy: y(loss), r: 2.5 });
    dot.append(svg("title", {}, `step ${step}: held-out loss ${loss.toFixed(4)}`));
    root.append(dot);
  }
  root.append(label(LEFT, HEIGHT - 5, "training loss (mean)", "start", "mean"));
  if (validation.length) root.append(label(RIGHT, HEIGHT - 5, "held-out loss", "end", "held-out"));
  return element("div", "plot", root);
}

/** The curves in words. */
function summary(steps, means, validation) {
  const span = (points) => `${number(points[0][1])} to ${number(points.at(-1)[1])}`;
  const parts = [`Loss over ${steps} steps`];
  if (means.length) parts.push(`mean training loss ${span(means)}`);
  if (validation.length) parts.push(`held-out loss ${span(validation)}`);
  return parts.join(", ");
}

function isKnown([, loss]) {
  return Number.isFinite(loss);
}

/** (step, mean of its value and of up to `window` - 1 before it). */
function runningMean(points, window) {
  let sum = 0;
  return points.map(([step, value], i) => {
    sum += value - (i >= window ? points[i - window][1] : 0);
    return [step, sum / Math.min(i + 1, window)];
  });
}

/** Evenly spaced ones of the points, the last one among them. */
function thin(points) {
  const every = Math.ceil(points.length / POINTS);
  return points.filter((_, i) => (i + 1) % every === 0 || i === points.length - 1);
}
