// The controls, and the request that they make. Knows the request's fields, not who sends it.

import { own } from "./colours.js";
import { byId, el, percent } from "./dom.js";

const FIXED = "fixed";
const NAMED = { "decar.weights": "route", logprobs: "alternatives", top_logprobs: "alternatives" };
const controls = byId("controls");
const field = (name) => controls.elements.namedItem(name);
let ensemble = null;

/** Have the controls offer what this ensemble has. What the user has chosen stays. */
export function offer(described) {
  const before = JSON.stringify([ensemble?.name, names(ensemble), ensemble?.routes, ensemble?.defaults]);
  ensemble = described;
  if (before === JSON.stringify([ensemble.name, names(ensemble), ensemble.routes, ensemble.defaults])) return;
  const alone = ensemble.experts.map(({ name, model }) => [model, `${name} alone`]);
  choices(field("model"), [["", "the ensemble"], ...alone]);
  choices(field("beside"), [["", "nobody"], ...alone]);
  const { route, rule, prune } = ensemble.defaults;
  const routes = ensemble.routes.map((kind) => [kind, kind]);
  choices(field("route"), [["", `default: ${route}`], ...routes, [FIXED, "fixed weights"]]);
  const starts = ensemble.routes.filter((kind) => kind !== "posterior").map((kind) => [kind, kind]);
  choices(field("start"), [["", "default"], ...starts]);
  field("rule").options[0].textContent = `default: ${rule}`;
  field("prune").placeholder = prune ? String(prune) : "never";
  field("top_k").max = ensemble.experts.length;
  sliders();
  update();
}

const names = (of) => of?.experts.map(({ name }) => name);

function choices(select, pairs) {
  const { value } = select;
  select.replaceChildren(...pairs.map(([key, text]) => el("option", { value: key, textContent: text })));
  select.value = pairs.some(([key]) => key === value) ? value : "";
}

function sliders() {
  const sum = ensemble.experts.reduce((total, { prior }) => total + prior, 0);
  byId("weights").replaceChildren(
    ...ensemble.experts.map(({ name, prior }, k) => {
      const swatch = el("span", { className: "swatch" });
      swatch.style.backgroundColor = own(k);
      const value = Math.round((100 * prior) / sum);
      const input = el("input", { type: "range", min: 0, max: 100, step: 1, name: `weight:${name}`, value });
      return el("label", {}, swatch, `${name} `, el("output"), input);
    }),
  );
}

const weightInputs = () => [...byId("weights").querySelectorAll("input")];

/** Show what the controls say by now, and only those that matter. */
function update() {
  const expertAlone = field("model").value !== "";
  byId("mixture").disabled = expertAlone;
  const route = field("route").value;
  const effective = route || ensemble?.defaults.route;
  byId("weights").hidden = route !== FIXED;
  byId("of-scope").hidden = effective !== "posterior";
  byId("of-start").hidden = effective !== "posterior" || field("scope").value !== "output";
  const values = weightInputs().map((input) => Number(input.value));
  const sum = values.reduce((a, b) => a + b, 0);
  weightInputs().forEach((input, k) => {
    input.parentElement.querySelector("output").textContent = sum ? percent(values[k] / sum) : "0 %";
  });
  byId("temperature-shown").textContent = Number(field("temperature").value).toFixed(2);
}

controls.addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  update();
});
controls.addEventListener("submit", (event) => event.preventDefault());

/** Whose answers are asked for: model ids, one or two. */
export function models() {
  const first = field("model").value || ensemble?.name;
  const second = field("beside").value;
  return second && second !== first ? [first, second] : [first];
}

/** What a model id is called on this page. */
export function titleOf(model) {
  const expert = ensemble.experts.find((each) => each.model === model);
  return expert ? `${expert.name} alone` : "The ensemble";
}

/**
 * The body of a request to `model`: what is asked, as given, and what the controls say.
 *
 * @param asked {messages} or {prompt}
 */
export function request(model, asked) {
  const alternatives = number("alternatives") ?? 0;
  const logprobs = asked.messages ? { logprobs: true, top_logprobs: alternatives } : { logprobs: alternatives };
  return compact({
    model,
    ...asked,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
    ...logprobs,
    decar: { ...(model === ensemble.name ? mixture() : {}), trace: true },
  });
}

/** The system prompt, if there is one. */
export const system = () => field("system").value.trim();

function mixture() {
  const fixed = field("route").value === FIXED;
  const visible = (name) => (byId(`of-${name}`).hidden ? undefined : field(name).value || undefined);
  return compact({
    route: fixed ? undefined : field("route").value || undefined,
    weights: fixed
      ? Object.fromEntries(weightInputs().map((i) => [i.name.slice("weight:".length), Number(i.value) / 100]))
      : undefined,
    scope: visible("scope"),
    start: visible("start"),
    rule: field("rule").value || undefined,
    prune: number("prune"),
    top_k: number("top_k"),
    sampling: field("sampling").value || undefined,
  });
}

const compact = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined));

function number(name) {
  const { value } = field(name);
  return value === "" ? undefined : Number(value);
}

/** Mark the control that a refused request's `param` names; whether there is one. */
export function blame(param) {
  const name = NAMED[param] ?? param?.replace("decar.", "");
  const control = name && field(name);
  control?.setAttribute("aria-invalid", "true");
  return Boolean(control);
}
