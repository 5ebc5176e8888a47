// Asking the server: keys, errors, and streams of server-sent events. Knows no page.

const KEY = "decar-api-key";
let key = remembered();

/** An answer that says no, or none at all (`status` 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export const hasKey = () => key !== "";

/** Keep the key for this tab: in memory, and where the browser allows it, until the tab is closed. */
export function useKey(text) {
  key = text.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // storage is switched off
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** The address of `path` on the server that this page is from, wherever a proxy has put it. */
export const address = (path) => new URL(path, document.baseURI).href;

/** The JSON at `path`. Throws ApiError. */
export async function get(path) {
  return (await request(path, {})).json();
}

/** The objects of an answer's stream. Throws ApiError, and AbortError where `signal` says so. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // not a TextDecoderStream, which drops what it holds when the connection breaks
  let rest = "";
  while (true) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError("The connection broke before the answer was whole.");
    });
    if (done) throw new ApiError("The connection ended before the answer was whole.");
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const data = JSON.parse(line.slice("data: ".length));
      if (data.error) throw new ApiError(data.error.message, { status: Number(data.error.code) || 500 });
      yield data;
    }
  }
}

async function request(path, options) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("No answer came. The server may have stopped, or the network is gone.");
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // a proxy's page, say
  }
  throw new ApiError(error.message ?? `The server answered with status ${response.status}.`, {
    status: response.status,
    param: error.param ?? null,
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
}

const TITLES = {
  0: "The server is out of reach",
  400: "The server could not use this request",
  401: "The server asks for an API key",
  403: "This key is not allowed to do that",
  404: "The server does not have this",
  413: "The request is too large",
  429: "The server is busy",
  500: "Something failed in the server",
  503: "The server is busy",
};

/** What to tell the user of an error: a title, a text, and whether asking again may help. */
export function explained(error) {
  if (!(error instanceof ApiError)) return { title: "Something failed in this page", text: String(error), again: true };
  const { status, message, retryAfter } = error;
  const text = retryAfter ? `${message.replace(/\.?$/, ".")} It asks to wait for ${retryAfter} s.` : message;
  return {
    title: TITLES[status] ?? TITLES[status < 500 ? 400 : 500],
    text: text.charAt(0).toUpperCase() + text.slice(1),
    again: status === 0 || status === 401 || status === 429 || status >= 500,
  };
}
