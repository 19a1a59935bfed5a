/** One report as elements: a line that folds and unfolds what else there is to say. */

import { bars } from "./bars.mjs";
import { chart } from "./chart.mjs";
import { curve } from "./curve.mjs";
import { element } from "./dom.mjs";
import { outcome } from "./outcome.mjs";
import { pictures } from "./pictures.mjs";
import { quantised } from "./quantised.mjs";
import { rates } from "./rates.mjs";
import { strip } from "./strip.mjs";
import { table } from "./table.mjs";

/**
 * @typedef {object} Report what a node sends; only the text is always there
 * @property {string} text the verdict in the first line, then details
 * @property {string} [headline] shorter than the verdict
 * @property {Record<string, import("./table.mjs").Match>} [matched] modules of an adapter by name
 * @property {Record<string, string>} [unmatched] module -> why it was not applied
 * @property {Record<string, string>} [ignored] what is no module of the adapter -> why
 * @property {string[]} [warnings]
 * @property {Record<string, import("./outcome.mjs").Made>} [rows] what a tool made, by name
 * @property {Record<string, string>} [left_out] name -> why it is not in the result
 * @property {Record<string, import("./quantised.mjs").Layer>} [layers] of a model that was quantised
 * @property {Record<string, string>} [kept] linear layer -> why it stayed as it is
 * @property {[number, number][]} [schedule] (sampling progress, strength)
 * @property {[string, string][]} [facts] (name, value)
 * @property {Record<string, string>} [metadata] of the file
 * @property {[string, number | null][]} [norms] (block, norm of its change)
 * @property {(number | null)[]} [losses] training loss of each step, null where it is not finite
 * @property {[number, number | null][]} [validation] (step, held-out loss)
 * @property {[number, number][]} [rates] (step, learning rate)
 * @property {import("./pictures.mjs").Preview[]} [previews]
 * @property {import("./strip.mjs").Run[]} [runs] sampling runs that went by the node
 * @property {boolean} [continues] the run has steps left and goes on when queued again
 */

/**
 * Folded where a line says all there is to know: everything in the file is in use as it is.
 *
 * @param {Report} report
 * @param {HTMLElement} view the positioned element that scrolls
 * @returns {HTMLElement}
 */
export function render(report, view) {
  const [first] = report.text.split("\n", 1);
  const state = kind(report);
  const body = element("div", "body", ...details(report, first, view));
  const line = verdict(report.headline ?? first, state, body.hasChildNodes() ? "summary" : "div");
  if (!body.hasChildNodes()) return line;
  const made = element("details", "", line, body);
  made.open = state !== "all" || Boolean(report.schedule ?? report.facts ?? report.runs);
  // Selecting the line's text must not fold it.
  line.addEventListener("click", (event) => {
    if (event.detail > 1 || !getSelection().isCollapsed) event.preventDefault();
  });
  return made;
}

/** The line alone. */
export function verdict(text, state, tag = "div") {
  const made = element(tag, `verdict ${state}`, element("span", "", text));
  made.title = text;
  return made;
}

/** @param {Report} report */
function kind({ matched, unmatched, warnings, rows, layers, runs }) {
  if (runs) return runs.every(({ skipped, stopped }) => skipped && !stopped) ? "all" : "partly";
  if (rows ?? layers) return warnings?.length ? "partly" : "all";
  if (!matched) return "plain";
  if (!Object.keys(matched).length) return "failed";
  return Object.keys(unmatched ?? {}).length || warnings?.length ? "partly" : "all";
}

function* details(report, first, view) {
  if (report.runs) {
    for (const [i, run] of report.runs.entries()) yield* sampled(run, i > 0);
    return;
  }
  const rest = report.text.slice(first.length).trim();
  if (report.headline && report.headline !== first) yield element("p", "", first);
  if (report.losses?.length) {
    const losses = report.losses.map((loss, i) => [i + 1, loss]);
    yield chart(losses, report.validation ?? []);
  }
  if (report.rates?.length) yield rates(report.rates);
  if (report.previews?.length) yield pictures(report.previews);
  if (rest) yield text(rest);
  if (report.facts?.length) yield facts(report.facts);
  const metadata = Object.entries(report.metadata ?? {});
  if (metadata.length) {
    const heading = element("summary", "", `${metadata.length} entries of metadata`);
    yield element("details", "", heading, facts(metadata));
  }
  const drawn = bars(report.norms ?? []);
  if (drawn) yield drawn;
  if (report.schedule?.length) yield curve(report.schedule);
  if (report.matched) yield table(report, view);
  if (Object.keys({ ...report.layers, ...report.kept }).length) {
    yield quantised(report.layers, report.kept, view);
  }
  const leftOut = report.left_out ?? {};
  const made = { ...report.rows };
  if (Object.keys({ ...made, ...leftOut }).length) yield outcome(made, leftOut, view);
}

/** One sampling run; `headed` where the line above is another's. */
function* sampled(run, headed) {
  if (headed) yield verdict(run.headline, kind({ runs: [run] }));
  const drawn = strip(run);
  if (drawn) yield drawn;
  if (run.notes.length) yield text(run.notes.join("\n"));
  if (run.facts.length) yield facts(run.facts);
}

function text(content) {
  const made = element("pre");
  for (const line of content.split("\n")) {
    made.append(element("span", line.startsWith("Warning:") ? "warning" : "", `${line}\n`));
  }
  return made;
}

function facts(pairs) {
  const made = element("dl");
  for (const [name, value] of pairs) made.append(element("dt", "", name), element("dd", "", value));
  return made;
}
