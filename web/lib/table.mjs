/** What became of each module of a file: a table of any length, rendered where it is looked at. */

import { element } from "./dom.mjs";

const ROW = 18; // pixels, as in panel.css
const AHEAD = 12; // rows kept beyond each edge of the view
const [NAMES, FACT] = [240, 50]; // pixels that columns need to be read
const FILTER_FROM = 13; // rows
const PREFIX = /^(?:diffusion_model\.|lora_unet_|lycoris_|transformer\.|base_model\.model\.)/;
const ORDER = new Intl.Collator("en", { numeric: true });

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

const WEIGHT = "block weight";

/** Heading and content of the columns that most files need only one value of. */
const FACTS = [
  ["algorithm", (match) => [match.title ?? match.algorithm, ...(match.traits ?? [])].join(" ")],
  ["rank", (match) => String(match.rank)],
  ["scale", (match) => number(match.scale)],
  [WEIGHT, (match) => number(match.strength ?? 1)],
];

/** A value to read, not to compute with; null is what JSON has for infinity and for no number. */
export function number(value) {
  if (!Number.isFinite(value)) return "not finite";
  return String(Number(value.toPrecision(4)));
}

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
  const [shared, varying] = [[], []];
  for (const [title, value] of FACTS) {
    const values = new Set(matches.map(value));
    if (values.size > 1) varying.push([title, value]);
    for (const only of values.size === 1 ? values : []) {
      if (title === WEIGHT && only === "1") continue;
      shared.push(title === "algorithm" ? only : `${title} ${only}`);
    }
  }
  const target = shortener(matches.map((match) => match.key));
  const rows = [
    ...sorted(unmatched).map(([name, reason]) => ({ name, reason, state: "missed", facts: [] })),
    ...sorted(ignored).map(([name, reason]) => ({ name, reason, state: "ignored", facts: [] })),
    ...sorted(matched).map(([name, match]) => ({
      name,
      target: target(match.key.replace(/\.weight$/, "")) + range(match.slice),
      full: match.key + range(match.slice),
      facts: varying.map(([, value]) => value(match)),
    })),
  ];
  const stem = shortener(rows.map((row) => row.name));
  const made = element("div", "modules");
  if (shared.length) made.append(element("div", "shared", `Each: ${shared.join(", ")}`));
  const list = new Rows(rows, stem, ["module", "target", ...varying.map(([title]) => title)], view);
  if (rows.length >= FILTER_FROM) made.append(filter(rows, list));
  made.append(list.element);
  return made;
}

/** By name, block 9 before block 10. */
function sorted(modules) {
  return Object.entries(modules).sort(([one], [other]) => ORDER.compare(one, other));
}

function range(slice) {
  if (!slice) return "";
  const [axis, offset, length] = slice;
  return `[${":, ".repeat(axis)}${offset}:${offset + length}]`;
}

/** Takes off the prefix that all names have. */
function shortener(names) {
  const prefix = names[0]?.match(PREFIX)?.[0] ?? "";
  const length = names.every((name) => name.startsWith(prefix)) ? prefix.length : 0;
  return (name) => name.slice(length);
}

/** A field that leaves the rows that hold every word typed into it. */
function filter(rows, list) {
  const made = element("label", "filter");
  const [field, count] = [element("input"), element("span")];
  field.type = "search";
  field.placeholder = `Filter ${rows.length} modules`;
  field.setAttribute("aria-label", field.placeholder);
  count.setAttribute("role", "status");
  const texts = rows.map((row) =>
    [row.name, row.full, row.reason, ...row.facts].join(" ").toLowerCase(),
  );
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((_, i) => words.every((word) => texts[i].includes(word)));
    count.textContent = words.length ? `${found.length} of ${rows.length}` : "";
    list.show(found);
  });
  made.append(field, count);
  return made;
}

/** Rows of equal height; only those near the view are in the document. */
class Rows {
  constructor(rows, stem, headings, view) {
    this.stem = stem;
    this.view = view;
    this.columns = headings.length;
    this.element = element("table");
    this.element.style.minWidth = `${NAMES + FACT * (headings.length - 2)}px`;
    const names = headings.map((heading) => element("th", heading.replace(" ", "-"), heading));
    for (const name of names) name.scope = "col";
    this.body = element("tbody");
    this.element.append(element("thead", "", element("tr", "", ...names)), this.body);
    this.show(rows);
    const draw = () => this.draw();
    view.addEventListener("scroll", draw, { passive: true });
    const resized = new ResizeObserver(draw);
    resized.observe(view);
    resized.observe(this.element);
  }

  show(rows) {
    this.rows = rows;
    this.drawn = "";
    this.element.setAttribute("aria-rowcount", String(rows.length + 1));
    this.draw();
  }

  draw() {
    const above = this.view.scrollTop - this.element.offsetTop - ROW;
    const first = Math.max(0, Math.min(Math.floor(above / ROW) - AHEAD, this.rows.length));
    const last = Math.min(first + Math.ceil(this.view.clientHeight / ROW) + 2 * AHEAD, this.rows.length);
    if (this.drawn === `${first} ${last}`) return;
    this.drawn = `${first} ${last}`;
    const shown = this.rows.slice(first, last).map((row, i) => this.#row(row, first + i));
    this.body.replaceChildren(gap(first), ...shown, gap(this.rows.length - last));
  }

  #row({ name, target, full, reason, state, facts }, i) {
    const made = element("tr", state);
    made.setAttribute("aria-rowindex", String(i + 2));
    made.append(cell("name", this.stem(name), name));
    if (reason === undefined) made.append(cell("name", target, full));
    else made.append(cell("reason", reason, reason, this.columns - 1));
    made.append(...facts.map((fact) => element("td", "fact", fact)));
    return made;
  }
}

/** A cell that may be cut off, with all of its text on hovering. */
function cell(name, text, title, columns = 1) {
  const made = element("td", name, element("bdi", "", text));
  made.title = title;
  made.colSpan = columns;
  return made;
}

function gap(rows) {
  const made = element("tr", "gap");
  made.ariaHidden = "true";
  made.style.height = `${rows * ROW}px`;
  return made;
}
