// Making elements. Text only ever becomes text: nothing here, or anywhere in this page, parses HTML.

/** A new element with properties and children; strings are text. */
export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A share as text: 0.4 %, 12 %, 99.9 %, 100 %. */
export function percent(share) {
  const value = 100 * share;
  const exact = value === 0 || value === 100 || (value >= 1 && value <= 99);
  return `${value.toFixed(exact ? 0 : value < 0.1 || value > 99.9 ? 2 : 1)} %`;
}

/** Copy text, also where the page is not served over HTTPS. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { value: text, className: "unseen" });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** Have a button say for a moment that it has done its work. */
export function confirm(button, said) {
  const before = button.textContent;
  button.textContent = said;
  setTimeout(() => (button.textContent = before), 1500);
}
