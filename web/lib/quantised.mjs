/** What quantising cost each layer of a model, and which layers were kept. */

import { element } from "./dom.mjs";
import { columns, rowsOf } from "./rows.mjs";
import { number, percent, sorted } from "./values.mjs";

const MEGA = 1e6;

/**
 * @typedef {object} Layer
 * @property {number} error relative, of its weight
 * @property {number} saturated share of its numbers
 * @property {number} subnormal the same
 * @property {number} before bytes
 * @property {number} after
 */

/** @type {import("./rows.mjs").Fact<Layer>[]} */
const FACTS = [
  {
    title: "MB",
    value: ({ before, after }) => `${megabytes(before)}→${megabytes(after)}`,
    told: (sizes) => `${sizes} MB`,
  },
  {
    title: "saturated",
    value: ({ saturated }) => percent(saturated),
    told: (share) => (share === "0%" ? "" : `${share} saturated`),
  },
  {
    title: "subnormal",
    value: ({ subnormal }) => percent(subnormal),
    told: (share) => (share === "0%" ? "" : `${share} subnormal`),
  },
  { title: "error", value: ({ error }) => percent(error), told: (error) => `error ${error}` },
];

/**
 * Layers as they come, the largest error first, then those that stayed as they are, and why.
 *
 * @param {Record<string, Layer>} layers by path
 * @param {Record<string, string>} kept path -> why
 * @param {HTMLElement} view the positioned element that scrolls
 */
export function quantised(layers, kept, view) {
  const all = Object.values(layers);
  const { shared, varying } = columns(FACTS, all);
  const largest = varying.includes(FACTS.at(-1)) ? Math.max(...all.map(({ error }) => error)) : 0;
  const rows = [
    ...Object.entries(layers).map(([name, layer]) => ({
      name,
      facts: varying.map(({ value }) => value(layer)),
      share: largest ? layer.error / largest : 0,
    })),
    ...sorted(kept).map(([name, why]) => ({
      name,
      reason: `kept: ${why}`,
      state: "ignored",
      facts: [],
    })),
  ];
  const titles = varying.map(({ title }) => title);
  // A reason needs a column beside the name.
  if (!titles.length && rows.length > all.length) titles.push("note");
  return element("div", "modules", ...shared, ...rowsOf(rows, ["layer", ...titles], view));
}

function megabytes(bytes) {
  return number(Number((bytes / MEGA).toPrecision(3)));
}
