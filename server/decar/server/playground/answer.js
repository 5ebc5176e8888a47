// One answer on the page: its tokens on their colours, the band of weights below, and what there is to say of it.

import { explained } from "./api.js";
import { background, own } from "./colours.js";
import { confirm, copy, el, percent } from "./dom.js";
import { meanWeights, Pieces, runs } from "./pieces.js";

const SVG = "http://www.w3.org/2000/svg";
const REASONS = { stop: "ended by itself", length: "cut at the most tokens allowed", abort: "ended by the server" };
const MEANS_SOMETHING_S = 0.5; // a rate; shorter answers come in a few pieces
const pieceOf = new WeakMap(); // of a token's element

/** The {piece, names} that a token's element shows, if it is one. */
export const shownBy = (element) => pieceOf.get(element);

/** An answer that grows. `names` are the experts', in the order of weights. */
export class Answer {
  #collected = new Pieces();
  #started = performance.now();
  #firstAt = null;
  #lastAt = null;
  #drawing = false;
  pieces = [];
  reason = null;
  degraded = [];

  constructor(title, names, prompt = "") {
    this.names = names;
    this.text = el("div", { className: "text" });
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `Answer of ${title}`);
    if (prompt) this.text.append(el("span", { className: "given", textContent: prompt }));
    this.band = document.createElementNS(SVG, "svg");
    this.band.setAttribute("class", "band");
    this.band.setAttribute("role", "img");
    this.band.setAttribute("preserveAspectRatio", "none");
    this.facts = el("div", { className: "facts" });
    this.element = el("article", { className: "answer" }, el("h2", {}, title), this.text, this.facts);
    this.element.setAttribute("aria-busy", "true");
    this.text.addEventListener("keydown", (event) => this.#move(event));
  }

  get said() {
    return this.pieces.map(({ text }) => text).join("");
  }

  get tokens() {
    return this.pieces.flatMap(({ tokens }) => tokens);
  }

  /** Take in a chunk of the stream. */
  add(chunk) {
    this.degraded = chunk.decar?.degraded ?? this.degraded;
    for (const choice of chunk.choices ?? []) {
      this.reason = choice.finish_reason ?? this.reason;
      for (const piece of this.#collected.add(choice)) this.#show(piece);
    }
  }

  #show(piece) {
    this.#lastAt = performance.now();
    this.#firstAt ??= this.#lastAt;
    const weights = meanWeights(piece.tokens);
    const element = el("span", { className: "token", textContent: piece.text });
    element.tabIndex = this.pieces.length ? -1 : 0; // one stop for Tab; arrow keys go on from there
    if (piece.text.includes("\n")) element.classList.add("line");
    if (weights) element.style.backgroundColor = background(weights);
    pieceOf.set(element, { piece, names: this.names });
    this.pieces.push(piece);
    this.text.append(element);
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
    });
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    const tokens = [...this.text.querySelectorAll(".token")];
    const from = tokens.indexOf(event.target);
    if (from < 0 || !(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const to = tokens[Math.min(Math.max(from + steps[event.key], 0), tokens.length - 1)];
    event.target.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  /** Draw the weights of every token so far, one expert on top of the other. */
  #draw() {
    const columns = this.tokens.map(({ weights }) => weights).filter(Boolean);
    if (!columns.length) return;
    if (!this.band.isConnected) this.facts.before(this.band);
    this.band.setAttribute("viewBox", `0 0 ${columns.length} 1`);
    const below = columns.map(() => 0);
    const paths = this.names.map((_, k) => {
      const there = below.map((value, t) => `M${t} ${value}h1v${columns[t][k]}h-1z`).join("");
      columns.forEach((weights, t) => (below[t] += weights[k]));
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("d", there);
      path.style.fill = own(k);
      return path;
    });
    this.band.replaceChildren(...paths);
    const means = meanWeights(this.tokens);
    const said = this.names.map((name, k) => `${name} ${percent(means[k])}`).join(", ");
    this.band.setAttribute("aria-label", `Weights over ${columns.length} tokens; on average ${said}`);
  }

  /** The answer is whole, or its user has stopped it. Returns a sentence that says so. */
  finish(usage, stopped = false) {
    this.#draw();
    this.element.removeAttribute("aria-busy");
    const count = usage?.completion_tokens ?? this.tokens.length;
    const said = [`${count} ${count === 1 ? "token" : "tokens"}`];
    if (this.#firstAt !== null) {
      const seconds = (this.#lastAt - this.#firstAt) / 1000;
      said.push(`first after ${((this.#firstAt - this.#started) / 1000).toFixed(2)} s`);
      if (seconds > MEANS_SOMETHING_S && count > 1) said.push(`${((count - 1) / seconds).toFixed(1)} a second`);
    }
    if (stopped) said.push("stopped by you");
    else if (!this.pieces.length) said.push("the first token ended it");
    else if (this.reason) said.push(REASONS[this.reason] ?? this.reason);
    this.facts.replaceChildren(this.#shares(), el("p", {}, said.join(" · ")));
    const leaders = changes(this.tokens.map(({ leader }) => leader));
    if (leaders) this.facts.append(el("p", {}, `led by ${leaders}`));
    if (this.degraded.length) {
      const lost = `${this.degraded.join(", ")} was lost on the way: the others have answered on`;
      this.facts.append(el("p", { className: "warning" }, lost));
    }
    if (this.pieces.length) this.facts.append(this.#asText(), this.#copier());
    return said.join(", ");
  }

  #shares() {
    const list = el("ul", { className: "shares" });
    const means = meanWeights(this.tokens) ?? [];
    means.forEach((share, k) => {
      const swatch = el("span", { className: "swatch" });
      swatch.style.backgroundColor = own(k);
      list.append(el("li", {}, swatch, `${this.names[k]} ${percent(share)}`));
    });
    return list;
  }

  /** Who spoke where, for whoever does not go by colours. */
  #asText() {
    const details = el("details", { className: "runs" }, el("summary", {}, "Who spoke where, in words"));
    const rows = runs(this.pieces).map(({ expert, weight, text }) =>
      el(
        "li",
        {},
        el("b", {}, `${this.names[expert]} ${percent(weight)}`),
        " ",
        el("q", {}, text.replaceAll("\n", "⏎")),
      ),
    );
    details.append(el("ol", {}, ...rows));
    return details;
  }

  #copier() {
    const button = el("button", { type: "button", className: "quiet", textContent: "Copy answer" });
    button.addEventListener("click", async () => {
      await copy(this.said);
      confirm(button, "Copied");
    });
    return button;
  }

  /** Say kindly what went wrong; `again` asks once more. Returns a sentence that says so. */
  fail(error, again) {
    if (this.pieces.length) this.finish(null);
    this.element.removeAttribute("aria-busy");
    const { title, text, again: mayHelp } = explained(error);
    const box = el("div", { className: "error" }, el("b", {}, title), el("p", {}, text));
    if (mayHelp) {
      const button = el("button", { type: "button", textContent: "Try again" });
      button.addEventListener("click", again);
      box.append(button);
    }
    this.facts.before(box);
    return `${title}. ${text}`;
  }
}

/** Who led from which token on. */
function changes(leaders) {
  const said = [];
  leaders.forEach((leader, t) => {
    if (!leader || leader === leaders[t - 1]) return;
    said.push(said.length ? `${leader} from token ${t + 1} on` : leader);
  });
  return said.length > 4 ? `${leaders[0]} first; the lead changed ${said.length - 1} times` : said.join(", ");
}
