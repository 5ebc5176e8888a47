// Images that go with the next message: chosen, pasted or dropped, and sent as data: URLs.

import { byId, el } from "./dom.js";

const MAX_BYTES = 20 * 2 ** 20; // base64 makes four bytes of three, and a request may have 32 MiB
let attached = []; // {name, url}
let allowed = false;

/** Whether the experts take images, as far as the page is to offer it. */
export function allow(yes) {
  allowed = yes;
  byId("attach").hidden = !yes;
  show();
}

/** The images that are attached, which then are no more. */
export function take() {
  const taken = allowed ? attached : [];
  if (allowed) attached = [];
  show();
  return taken;
}

/** The images that are attached. */
export const look = () => (allowed ? attached : []);

/** Attach what the user gives; `refuse` is told of what cannot be. */
export function listen(composer, refuse) {
  const add = async (files) => {
    for (const file of files) {
      if (!file.type.startsWith("image/")) refuse(`${file.name} is not an image.`);
      else if (file.size > MAX_BYTES) refuse(`${file.name} is larger than ${MAX_BYTES / 2 ** 20} MiB.`);
      else attached = [...attached, { name: file.name, url: await read(file) }];
    }
    show();
  };
  byId("attach").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async (event) => {
    await add([...event.target.files]);
    event.target.value = "";
  });
  composer.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!allowed || !files.length) return;
    event.preventDefault();
    add(files);
  });
  composer.addEventListener("dragover", (event) => allowed && event.preventDefault());
  composer.addEventListener("drop", (event) => {
    if (!allowed || !event.dataTransfer.files.length) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function show() {
  const list = byId("attached");
  list.hidden = !look().length;
  list.replaceChildren(
    ...look().map((image) => {
      const remove = el("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${image.name}`);
      remove.addEventListener("click", () => {
        attached = attached.filter((other) => other !== image);
        show();
        byId("prompt").focus();
      });
      return el("li", {}, el("img", { src: image.url, alt: image.name }), remove);
    }),
  );
}
