/** Numbers and names as a user reads them. */

const PREFIX = /^(?:diffusion_model\.|lora_unet_|lycoris_|transformer\.|base_model\.model\.)/;
const ORDER = new Intl.Collator("en", { numeric: true });

/** A value to read, not to compute with; null is what JSON has for infinity and for no number. */
export function number(value) {
  if (!Number.isFinite(value)) return "not finite";
  return String(Number(value.toPrecision(4)));
}

/** A share in percent; "" for null, which is what is exact. */
export function percent(share) {
  if (share == null) return "";
  const value = 100 * share;
  return value > 0 && value < 0.01 ? "< 0.01%" : `${number(Number(value.toPrecision(3)))}%`;
}

/** By name, block 9 before block 10. */
export function sorted(modules) {
  return Object.entries(modules).sort(([one], [other]) => ORDER.compare(one, other));
}

/** Takes off the prefix that all names have. */
export function shortener(names) {
  const prefix = names[0]?.match(PREFIX)?.[0] ?? "";
  const length = names.every((name) => name.startsWith(prefix)) ? prefix.length : 0;
  return (name) => name.slice(length);
}
