/** What became of each module of a file. */

import { element } from "./dom.mjs";
import { columns, rowsOf } from "./rows.mjs";
import { number, shortener, sorted } from "./values.mjs";

/**
 * @typedef {object} Match
 * @property {string} key name of the weight
 * @property {[number, number, number] | null} slice axis, offset and length where it is a part
 * @property {string} algorithm
 * @property {string} [title] of the algorithm
 * @property {number} rank
 * @property {number | null} scale
 * @property {string[]} [traits]
 * @property {number} [strength] factor on the strength of the whole adapter
 */

/** @type {import("./rows.mjs").Fact<Match>[]} */
const FACTS = [
  {
    title: "algorithm",
    value: ({ title, algorithm, traits = [] }) => [title ?? algorithm, ...traits].join(" "),
  },
  { title: "rank", value: ({ rank }) => String(rank), told: (rank) => `rank ${rank}` },
  { title: "scale", value: ({ scale }) => number(scale), told: (scale) => `scale ${scale}` },
  {
    title: "block weight",
    value: ({ strength = 1 }) => number(strength),
    told: (weight) => (weight === "1" ? "" : `block weight ${weight}`),
  },
];

/**
 * What was not applied comes first, with the reason. A column whose value is the same in all rows
 * is said once, above the table.
 *
 * @param {{matched: Record<string, Match>, unmatched?: Record<string, string>,
 *   ignored?: Record<string, string>}} report module -> where it went, or why nowhere
 * @param {HTMLElement} view the positioned element that scrolls
 */
export function table({ matched, unmatched = {}, ignored = {} }, view) {
  const matches = Object.values(matched);
  const { shared, varying } = columns(FACTS, matches);
  const target = shortener(matches.map((match) => match.key));
  const rows = [
    ...sorted(unmatched).map(([name, reason]) => ({ name, reason, state: "missed", facts: [] })),
    ...sorted(ignored).map(([name, reason]) => ({ name, reason, state: "ignored", facts: [] })),
    ...sorted(matched).map(([name, match]) => ({
      name,
      target: target(match.key.replace(/\.weight$/, "")) + range(match.slice),
      full: match.key + range(match.slice),
      facts: varying.map(({ value }) => value(match)),
    })),
  ];
  const headings = ["module", "target", ...varying.map(({ title }) => title)];
  return element("div", "modules", ...shared, ...rowsOf(rows, headings, view));
}

function range(slice) {
  if (!slice) return "";
  const [axis, offset, length] = slice;
  return `[${":, ".repeat(axis)}${offset}:${offset + length}]`;
}
