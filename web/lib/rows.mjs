/** A table of any length, rendered where it is looked at, with a field to filter it. */

import { element } from "./dom.mjs";
import { shortener } from "./values.mjs";

const ROW = 18; // pixels, as in panel.css
const AHEAD = 12; // rows kept beyond each edge of the view
const [NAMES, FACT] = [240, 50]; // pixels that columns need to be read
const FILTER_FROM = 13; // rows

/**
 * @typedef {object} Row
 * @property {string} name of the module or file
 * @property {string} [target] what it goes to; `full`: all of that, to be seen on hovering
 * @property {string} [full]
 * @property {string} [reason] why nothing was done, in the place of everything else
 * @property {string} [state] class of the row
 * @property {string[]} facts the further columns
 * @property {number} [share] of the last fact in the largest one there is, drawn below it
 */

/**
 * @template T
 * @typedef {object} Fact a column of a table of T
 * @property {string} title
 * @property {(one: T) => string} value
 * @property {(value: string) => string} [told] the value where it is said once for all rows
 */

/**
 * The facts that differ between rows, and a line with those that do not.
 *
 * @template T
 * @param {Fact<T>[]} facts
 * @param {T[]} all
 * @returns {{shared: HTMLElement[], varying: Fact<T>[]}}
 */
export function columns(facts, all) {
  const [same, varying] = [[], []];
  for (const fact of facts) {
    const values = new Set(all.map(fact.value));
    if (values.size > 1) varying.push(fact);
    else same.push(...[...values].map(fact.told ?? String));
  }
  const said = same.filter(Boolean).join(", ");
  return { shared: said ? [element("div", "shared", `Each: ${said}`)] : [], varying };
}

/**
 * @param {Row[]} rows
 * @param {string[]} headings of all columns
 * @param {HTMLElement} view the positioned element that scrolls
 * @returns {HTMLElement[]}
 */
export function rowsOf(rows, headings, view) {
  const list = new Rows(rows, shortener(rows.map((row) => row.name)), headings, view);
  return rows.length < FILTER_FROM ? [list.element] : [filter(rows, list, headings[0]), list.element];
}

/** A field that leaves the rows that hold every word typed into it. */
function filter(rows, list, what) {
  const made = element("label", "filter");
  const [field, count] = [element("input"), element("span")];
  field.type = "search";
  field.placeholder = `Filter ${rows.length} ${what}s`;
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

  #row({ name, target, full, reason, state, facts, share }, i) {
    const made = element("tr", state);
    made.setAttribute("aria-rowindex", String(i + 2));
    made.append(cell("name", this.stem(name), name));
    if (reason !== undefined) made.append(cell("reason", reason, reason, this.columns - 1));
    else if (target !== undefined) made.append(cell("name", target, full));
    made.append(...facts.map((fact) => cell("fact", fact, fact)));
    if (share) made.lastChild.style.setProperty("--share", share.toFixed(3));
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
