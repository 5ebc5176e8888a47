// The conversation: what is asked, of whom, and where the answers go. The other modules do not know each other's state.

import { address, hasKey, stream, useKey } from "./api.js";
import { Answer } from "./answer.js";
import { curl, python, shortened } from "./code.js";
import { own } from "./colours.js";
import { byId, confirm, copy, el } from "./dom.js";
import { Watch } from "./experts.js";
import * as images from "./images.js";
import * as settings from "./settings.js";
import { showTips } from "./tip.js";

const NEAR_PX = 80; // from the end: whoever is there goes along with what is added

const composer = byId("composer");
const prompt = byId("prompt");
const log = byId("log");
let experts = []; // names, in the order of weights
let takesImages = false;
let turns = []; // {text, images, answers}
let running = null; // AbortController of what is being answered

const watch = new Watch(connected, () => askForKey("This server asks for an API key."));
const mode = () => composer.elements.namedItem("mode").value;
const announce = (text) => (byId("announce").textContent = text);

function connected(ensemble) {
  experts = ensemble.experts.map(({ name }) => name);
  byId("ensemble-name").textContent = ensemble.name;
  byId("ensemble-size").textContent = `${experts.length} experts trained apart`;
  document.title = `${ensemble.name} · decar playground`;
  settings.offer(ensemble);
  takesImages = Boolean(ensemble.images);
  images.allow(takesImages && mode() === "chat");
  const legend = byId("legend");
  if (legend.textContent === experts.join("")) return;
  legend.replaceChildren(
    ...experts.map((name, k) => {
      const swatch = el("li", { textContent: name });
      swatch.style.backgroundColor = own(k);
      return swatch;
    }),
  );
}

// ---------------------------------------------------------------------------------------------- asking

/** What is sent for `turn` in the conversation that has `model`'s answers (the `side`th of each turn). */
function asked(turn, side) {
  if (turn.mode === "completion") return { prompt: turn.text };
  const messages = settings.system() ? [{ role: "system", content: settings.system() }] : [];
  const before = turns.includes(turn) ? turns.slice(0, turns.indexOf(turn)) : turns;
  for (const earlier of before.filter((other) => other.mode === "chat")) {
    const answer = earlier.answers[side] ?? earlier.answers[0];
    if (!answer?.said) continue;
    messages.push(message(earlier), { role: "assistant", content: answer.said });
  }
  return { messages: [...messages, message(turn)] };
}

function message({ text, images: pictures }) {
  if (!pictures.length) return { role: "user", content: text };
  const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...parts, { type: "text", text }] };
}

const pathOf = (turn) => (turn.mode === "chat" ? "v1/chat/completions" : "v1/completions");
const draft = () => ({ mode: mode(), text: prompt.value, images: images.look(), answers: [] });

function send() {
  const turn = draft();
  images.take();
  prompt.value = turn.mode === "chat" ? "" : prompt.value;
  turn.answersBox = el("div", { className: "answers" });
  turn.element = el("section", { className: `turn ${turn.mode}` }, turn.answersBox);
  turn.element.setAttribute("aria-label", `Turn ${turns.length + 1}`);
  if (turn.mode === "chat") {
    const pictures = turn.images.map(({ name, url }) => el("img", { src: url, alt: name }));
    turn.answersBox.before(el("div", { className: "asked" }, el("div", { className: "pictures" }, ...pictures), el("p", {}, turn.text)));
  }
  turns.push(turn);
  byId("turns").append(turn.element);
  byId("welcome").hidden = true;
  answer(turn);
}

async function answer(turn) {
  const abort = (running = new AbortController());
  byId("turns").querySelectorAll(".again").forEach((button) => button.remove());
  const models = settings.models();
  const given = turn.mode === "completion" ? turn.text : "";
  turn.answers = models.map((model) => new Answer(settings.titleOf(model), experts, given));
  turn.answersBox.replaceChildren(...turn.answers.map(({ element }) => element));
  log.scrollTop = log.scrollHeight;
  shows(true);
  announce("Answering");
  const said = await Promise.all(models.map((model, side) => fill(turn, side, model, abort.signal)));
  if (running !== abort) return; // a new conversation has begun
  running = null;
  shows(false);
  const again = el("button", { type: "button", className: "again quiet", textContent: "Answer again" });
  again.addEventListener("click", () => !running && answer(turn));
  if (!turn.element.querySelector(".error button")) following(() => turn.element.append(again));
  announce(said.join(". "));
  watch.ask();
}

/** Stream one answer; gives a sentence that says how it ended. */
async function fill(turn, side, model, signal) {
  const view = turn.answers[side];
  let usage = null;
  try {
    const body = settings.request(model, asked(turn, side));
    for await (const chunk of stream(pathOf(turn), body, signal)) {
      usage = chunk.usage ?? usage;
      following(() => view.add(chunk));
    }
    return following(() => `${settings.titleOf(model)}: ${view.finish(usage)}`);
  } catch (error) {
    if (error.name === "AbortError") return view.finish(null, true);
    settings.blame(error.param);
    if (error.status === 401) askForKey("This server asks for an API key, or for another one.");
    if (error.status === undefined) console.error(error);
    return following(() => view.fail(error, () => !running && answer(turn)));
  }
}

/** Change what is shown; whoever reads the end goes along. */
function following(change) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  const result = change();
  if (near) log.scrollTop = log.scrollHeight;
  return result;
}

function shows(busy) {
  byId("send").textContent = busy ? "Stop" : "Send";
  byId("send").classList.toggle("stop", busy);
  watch.busy = busy;
  if (busy) watch.ask();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (!experts.length) watch.ask();
  else if (prompt.value.trim() || images.look().length) send();
  prompt.focus();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  const sends = mode() === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (!sends) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
});
byId("mode").addEventListener("change", () => {
  const chat = mode() === "chat";
  prompt.placeholder = chat ? "Ask something" : "Text to go on with";
  byId("prompt-label").textContent = chat ? "Message" : "Prompt";
  byId("keys").textContent = chat ? "Enter sends, Shift+Enter breaks the line" : "Ctrl+Enter sends";
  byId("of-system").hidden = !chat;
  images.allow(takesImages && chat);
});
byId("new").addEventListener("click", () => {
  running?.abort();
  running = null;
  shows(false);
  turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  prompt.focus();
});

// ---------------------------------------------------------------------------------------------- dialogs

const keyDialog = byId("key-dialog");
const codeDialog = byId("code-dialog");

function askForKey(why) {
  if (why) byId("key-why").textContent = `${why} It is kept in this tab alone, until the tab is closed.`;
  if (!keyDialog.open) keyDialog.showModal();
}
byId("open-key").addEventListener("click", () => askForKey());
keyDialog.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  keyDialog.close();
  watch.ask();
});
for (const dialog of [keyDialog, codeDialog]) {
  dialog.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
}

function code() {
  const turn = prompt.value.trim() || !turns.length ? draft() : turns.at(-1);
  const body = settings.request(settings.models()[0], asked(turn, 0));
  return codeDialog.querySelector("input:checked").value === "curl"
    ? curl(address(pathOf(turn)), body, hasKey())
    : python(address("v1"), body, hasKey());
}
function showCode() {
  const [whole, short] = [code(), shortened(code())];
  byId("code").textContent = short;
  byId("code-hint").hidden = short === whole;
}
byId("show-code").addEventListener("click", () => {
  if (!experts.length) return;
  showCode();
  codeDialog.showModal();
});
codeDialog.addEventListener("change", showCode);
byId("copy-code").addEventListener("click", async (event) => {
  await copy(code());
  confirm(event.target, "Copied");
});

byId("open-settings").addEventListener("click", (event) => {
  const open = byId("settings").classList.toggle("open");
  event.target.setAttribute("aria-expanded", String(open));
});

images.listen(composer, (text) =>
  following(() => byId("turns").append(el("p", { className: "error", role: "alert" }, text))),
);

showTips(log);
watch.ask();
