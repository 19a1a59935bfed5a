/** What a tool made of each module or file, and how far it is from what it stands for. */

import { element } from "./dom.mjs";
import { columns, rowsOf } from "./rows.mjs";
import { percent, sorted } from "./values.mjs";

/**
 * @typedef {object} Made
 * @property {string} made what it is now
 * @property {number | null} rank
 * @property {number | null} error relative, null where it is exact
 * @property {string} note
 */

/** @type {import("./rows.mjs").Fact<Made>} */
const ERROR = {
  title: "error",
  value: ({ error }) => percent(error),
  told: (error) => error && `error ${error}`,
};
const FACTS = [
  { title: "result", value: ({ made, rank }) => (rank == null ? made : `${made} ${rank}`) },
  { title: "note", value: ({ note }) => note },
  ERROR,
];

/**
 * What was left out comes first, with the reason; a bar below an error shows it beside the largest.
 *
 * @param {Record<string, Made>} made by name
 * @param {Record<string, string>} leftOut name -> why it is not in the result
 * @param {HTMLElement} view the positioned element that scrolls
 */
export function outcome(made, leftOut, view) {
  const all = Object.values(made);
  const { shared, varying } = columns(FACTS, all);
  const compared = varying.includes(ERROR) ? all.map(({ error }) => error ?? 0) : [];
  const largest = Math.max(0, ...compared);
  const rows = [
    ...sorted(leftOut).map(([name, reason]) => ({ name, reason, state: "ignored", facts: [] })),
    ...sorted(made).map(([name, one]) => ({
      name,
      facts: varying.map(({ value }) => value(one)),
      share: largest ? (one.error ?? 0) / largest : 0,
    })),
  ];
  const titles = varying.map(({ title }) => title);
  // A reason needs a column beside the name.
  if (!titles.length && rows.length > all.length) titles.push("note");
  return element("div", "modules", ...shared, ...rowsOf(rows, ["name", ...titles], view));
}
