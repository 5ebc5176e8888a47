// How every expert is: asked of the server again and again while somebody looks, and shown.

import { ApiError, get } from "./api.js";
import { own } from "./colours.js";
import { byId, el, percent } from "./dom.js";

const EVERY_MS = 5000;
const EVERY_MS_BUSY = 1000;

/** Keeps asking; tells `then` of what came, and `refused` of a key that is missing. */
export class Watch {
  #timer = 0;
  #before = null;
  busy = false;

  constructor(then, refused) {
    this.then = then;
    this.refused = refused;
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this.#timer) : this.ask()));
  }

  /** Ask now, and from now on. */
  async ask() {
    clearTimeout(this.#timer);
    try {
      const ensemble = await get("v1/ensemble");
      this.#show(ensemble);
      this.then(ensemble);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const status = byId("health");
      status.className = "bad";
      say(status, error.status === 401 ? "needs an API key" : error.status ? "not ready" : "out of reach");
      if (error.status === 401) return this.refused(); // who gives a key has it asked again
    }
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.ask(), this.busy ? EVERY_MS_BUSY : EVERY_MS);
  }

  #show(ensemble) {
    const { experts, slots, queue } = ensemble;
    const up = experts.filter((expert) => expert.up).length;
    const status = byId("health");
    status.className = up === experts.length ? "good" : up ? "fair" : "bad";
    say(status, `${up} of ${experts.length} experts up`);
    const at = performance.now();
    const passed = this.#before && (at - this.#before.at) / 1000;
    const earlier = new Map(this.#before?.experts.map(({ name, lockstep }) => [name, lockstep]));
    const shares = experts.reduce((sum, { prior }) => sum + prior, 0);
    const rows = experts.map((expert, k) => row(expert, k, expert.prior / shares, earlier.get(expert.name), passed));
    byId("experts").replaceChildren(...rows);
    const waits = queue.waiting ? `, ${queue.waiting} requests wait` : "";
    byId("load").textContent = `${slots.in_use} of ${slots.total} slots in use${waits}`;
    this.#before = { at, experts };
  }
}

/** A status is announced where its text changes, and only there. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function row({ name, up, leads, lockstep }, k, prior, earlier, passed) {
  const swatch = el("span", { className: "swatch" });
  swatch.style.backgroundColor = own(k);
  const since = (counter) => Math.max(0, lockstep[counter] - earlier[counter]);
  const measured = earlier && passed && since("steps") > 0;
  const busy = measured ? Math.min(1, since("forward_ns") / 1e9 / passed) : 0;
  const load = measured ? `busy ${percent(busy)}` : "idle";
  const bar = el("span", { className: "bar" });
  bar.style.width = `${100 * busy}%`;
  bar.style.backgroundColor = own(k);
  const leading = leads ? `, leads ${leads}` : "";
  return el(
    "li",
    { className: up ? "" : "down" },
    swatch,
    el("b", {}, name),
    el("span", { className: "state" }, up ? "up" : "down, being started again"),
    el("span", { className: "track" }, bar),
    el("span", { className: "hint" }, `prior ${percent(prior)} · ${up ? load + leading : "no load"}`),
  );
}
