/** A training run as it goes on: figures, the loss curve and preview pictures. */

import { chart } from "./chart.mjs";
import { element } from "./dom.mjs";
import { pictures } from "./pictures.mjs";
import { number } from "./values.mjs";

/**
 * @typedef {object} State what the server sends after a step
 * @property {number} step completed steps
 * @property {number} steps asked for
 * @property {number} start the step at which this part of the run began
 * @property {number | null} loss
 * @property {number | null} smooth its running mean
 * @property {number} rate learning rate
 * @property {number | null} norm of the gradient before clipping
 * @property {number | null} per_second steps
 * @property {number | null} left seconds
 * @property {number | null} memory bytes
 * @property {[number, number | null, number | null][]} points (step, loss, mean) since the last
 * @property {[number, number | null][]} validation (step, held-out loss)
 * @property {string} text what is being done
 */

/** What is shown of a state, each left out where it is not known. */
const FIGURES = [
  ["step", ({ step, steps }) => `${step} of ${steps}`],
  ["loss", ({ loss }) => fixed(loss)],
  ["mean", ({ smooth }) => fixed(smooth)],
  ["held-out", ({ validation }) => fixed(validation?.at(-1)?.[1])],
  ["rate", ({ rate }) => rate?.toExponential(2)],
  ["gradient", ({ norm }) => known(norm) && number(norm)],
  ["speed", ({ per_second: speed }) => pace(speed)],
  ["left", ({ left }) => known(left) && clock(left)],
  ["memory", ({ memory }) => memory && bytes(memory)],
];

export class Live {
  constructor() {
    this.element = element("div", "live");
    this.figures = element("div", "figures");
    this.figures.setAttribute("role", "status");
    this.said = element("div", "said");
    this.plot = element("div");
    this.album = element("div");
    this.element.append(this.figures, this.said, this.plot, this.album);
    this.#restart();
  }

  /** @param {State} state */
  update(state) {
    if (state.step < this.step || state.start !== this.start) this.#restart();
    [this.step, this.start] = [state.step, state.start];
    this.points.push(...(state.points ?? []));
    this.figures.replaceChildren(
      ...FIGURES.map(([name, read]) => [name, read(state)])
        .filter(([, value]) => value)
        .map(([name, value]) => element("span", "", element("i", "", name), ` ${value}`)),
    );
    this.said.textContent = state.text ?? "";
    if (!this.points.length) return;
    const losses = this.points.map(([step, loss]) => [step, loss]);
    const means = this.points.map(([step, , mean]) => [step, mean]);
    this.plot.replaceChildren(chart(losses, state.validation ?? [], { means, steps: state.steps }));
  }

  /** @param {import("./pictures.mjs").Preview} preview */
  picture(preview) {
    this.previews = [...this.previews.filter(({ step }) => step !== preview.step), preview];
    this.album.replaceChildren(pictures(this.previews));
  }

  #restart() {
    [this.step, this.start] = [0, undefined];
    /** @type {[number, number | null, number | null][]} */
    this.points = [];
    /** @type {import("./pictures.mjs").Preview[]} */
    this.previews = [];
    this.plot.replaceChildren();
    this.album.replaceChildren();
  }
}

function known(value) {
  return Number.isFinite(value);
}

function fixed(value) {
  return known(value) && value.toFixed(4);
}

/** Whichever of steps a second and seconds a step is the larger number. */
function pace(speed) {
  if (!known(speed) || speed <= 0) return "";
  return speed < 1 ? `${(1 / speed).toFixed(2)} s/step` : `${speed.toFixed(2)} steps/s`;
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

function bytes(count) {
  const gib = count / 2 ** 30;
  return gib < 1 ? `${Math.round(gib * 1024)} MiB` : `${gib.toFixed(1)} GiB`;
}
