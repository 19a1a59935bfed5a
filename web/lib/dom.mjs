/** Elements made without markup: text from files and models is never parsed. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {string} [name] its classes
 * @param {...(Node | string)} children
 */
export function element(tag, name = "", ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
export function svg(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

/** A text in a drawing; `anchor` is "start", "middle" or "end". */
export function label(x, y, text, anchor, name = "") {
  return svg("text", { x, y, "text-anchor": anchor, class: name }, text);
}

/** A line through (x, y) points. */
export function polyline(name, points) {
  const path = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
  return svg("polyline", { class: name, points: path.join(" ") });
}
