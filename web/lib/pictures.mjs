/** Preview pictures of a training run, by step. */

import { api } from "../../../scripts/api.js";
import { element } from "./dom.mjs";

/**
 * @typedef {object} Preview
 * @property {number} step
 * @property {{filename: string, subfolder: string, type: string}[]} images
 */

/**
 * The latest first: that is what one waits for.
 *
 * @param {Preview[]} previews
 * @returns {HTMLElement}
 */
export function pictures(previews) {
  const made = element("div", "pictures");
  for (const { step, images } of [...previews].sort((a, b) => b.step - a.step)) {
    for (const image of images) made.append(figure(step, image));
  }
  return made;
}

function figure(step, image) {
  // A restarted run writes other pictures under the same names.
  const query = new URLSearchParams({ ...image, rand: String(performance.timeOrigin) });
  const shown = element("img");
  shown.src = api.apiURL(`/view?${query}`);
  shown.alt = `sample after ${step} steps`;
  shown.loading = "lazy";
  const link = element("a", "", shown);
  [link.href, link.target] = [shown.src, "_blank"];
  return element("figure", "", link, element("figcaption", "", `step ${step}`));
}
