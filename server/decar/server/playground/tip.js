// What a token's experts thought: shown beside the token that is pointed at or has the focus.

import { shownBy } from "./answer.js";
import { own } from "./colours.js";
import { byId, el, percent } from "./dom.js";
import { meanWeights } from "./pieces.js";

const LINGER_MS = 150; // on the way from the token to the tip
const MARGIN = 8; // px

/** Show tips for tokens within `root`. */
export function showTips(root) {
  const tip = byId("tip");
  let current = null;
  let leaving = 0;

  function show(token) {
    const shown = token && shownBy(token);
    if (!shown) return;
    clearTimeout(leaving);
    if (current !== token) hide();
    current = token;
    tip.replaceChildren(...content(shown));
    tip.hidden = false;
    place(tip, token);
    token.setAttribute("aria-describedby", tip.id);
  }
  function hide() {
    current?.removeAttribute("aria-describedby");
    current = null;
    tip.hidden = true;
  }
  function hideSoon() {
    clearTimeout(leaving);
    leaving = setTimeout(() => {
      const focused = document.activeElement;
      if (shownBy(focused)) show(focused);
      else hide();
    }, LINGER_MS);
  }
  root.addEventListener("pointerover", (event) => show(event.target));
  root.addEventListener("pointerout", hideSoon);
  root.addEventListener("focusin", (event) => show(event.target));
  root.addEventListener("focusout", hideSoon);
  root.addEventListener("click", (event) => shownBy(event.target) && event.target.focus());
  root.addEventListener("scroll", hide, { passive: true });
  tip.addEventListener("pointerenter", () => clearTimeout(leaving));
  tip.addEventListener("pointerleave", hideSoon);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

function content({ piece, names }) {
  const { tokens, text } = piece;
  const [first] = tokens;
  const parts = [el("p", { className: "said" }, quoted(text))];
  if (tokens.length > 1) parts.push(el("p", { className: "hint" }, `${tokens.length} tokens, which make up this text`));
  else if (first?.probability !== undefined) parts[0].append(el("span", {}, percent(first.probability)));
  const weights = meanWeights(tokens);
  if (weights) {
    const list = weights.map((weight, k) => [names[k], weight, own(k)]);
    parts.push(heading("Weights"), bars(list));
  }
  if (first?.leader) parts.push(el("p", { className: "hint" }, `led by ${first.leader}`));
  if (tokens.length === 1 && first.alternatives?.length) {
    parts.push(heading("Might have been said"), bars(others(first)));
  }
  return parts;
}

const others = ({ token, alternatives }) =>
  alternatives.map(([text, p]) => [quoted(text), p, "", text === token]);
const heading = (text) => el("p", { className: "heading" }, text);
const quoted = (text) => `“${text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣")}”`;

function bars(rows) {
  const list = el("ul", { className: "bars" });
  for (const [label, share, colour, said] of rows) {
    const bar = el("span", { className: "bar" });
    bar.style.width = `${100 * share}%`;
    if (colour) bar.style.backgroundColor = colour;
    const track = el("span", { className: "track" }, bar);
    list.append(el("li", { className: said ? "chosen" : "" }, el("span", { className: "label" }, label), track, el("span", {}, percent(share))));
  }
  return list;
}

/** Below the token, or above it where there is no room; always within the window. */
function place(tip, token) {
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.min(at.left, document.documentElement.clientWidth - width - MARGIN);
  const below = at.bottom + MARGIN;
  const fits = below + height <= window.innerHeight;
  tip.style.left = `${Math.max(left, MARGIN)}px`;
  tip.style.top = `${fits ? below : Math.max(at.top - height - MARGIN, MARGIN)}px`;
}
