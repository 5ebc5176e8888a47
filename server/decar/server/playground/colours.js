// Experts' colours, and mixtures of them, in OKLab: there, the middle of two colours looks like their middle.
//
// The palette was searched for the largest smallest distance between any two, for readers with normal vision and for
// those who lack one kind of cone (simulated after Machado et al., 2009), where the page's text has a contrast of 4.5
// or more on each. tests/e2e/test_playground.py holds it to both.

/** [L, a, b] of each expert's colour as a background. */
export const PALETTE = {
  light: [
    [0.85, -0.026, -0.072], // blue
    [0.85, 0.051, 0.087], // orange
    [0.91, -0.115, 0.0], // teal
    [0.79, 0.058, -0.1], // violet
    [0.79, 0.108, 0.039], // red
    [0.91, -0.088, 0.074], // green
    [0.79, -0.02, 0.113], // yellow
    [0.79, 0.108, -0.039], // pink
  ],
  dark: [
    [0.45, -0.041, -0.113],
    [0.52, 0.06, 0.104],
    [0.38, -0.068, 0.0],
    [0.38, 0.06, -0.104],
    [0.38, 0.113, 0.041],
    [0.52, -0.092, 0.077],
    [0.45, -0.016, 0.091],
    [0.45, 0.113, -0.041],
  ],
};
const GOLDEN_ANGLE = Math.PI * (3 - Math.sqrt(5));

/** [L, a, b] of expert number `k`; beyond the palette, hues far from those before, which are not checked. */
export function colour(k, theme) {
  if (k < PALETTE[theme].length) return PALETTE[theme][k];
  const [level, hue] = [theme === "light" ? [0.82, 0.88] : [0.38, 0.46], k * GOLDEN_ANGLE];
  return [level[k % 2], 0.07 * Math.cos(hue), 0.07 * Math.sin(hue)];
}

/** The mixture of the experts' colours by `weights`, of any sum above zero. */
export function mix(weights, theme) {
  const sum = weights.reduce((a, b) => a + b, 0);
  const mixed = [0, 0, 0];
  weights.forEach((weight, k) => colour(k, theme).forEach((value, i) => (mixed[i] += (weight / sum) * value)));
  return mixed;
}

/** A CSS colour that is the mixture in either theme. */
export function background(weights) {
  return `light-dark(${css(mix(weights, "light"))}, ${css(mix(weights, "dark"))})`;
}

/** A CSS colour for expert number `k` alone. */
export function own(k) {
  return `light-dark(${css(colour(k, "light"))}, ${css(colour(k, "dark"))})`;
}

function css(lab) {
  return `oklab(${lab.map((value) => value.toFixed(4)).join(" ")})`;
}
