// A request as a command and as a program, to copy. Knows requests, no page.

const LONG = 120; // characters of an image's address that are shown

/** `body` to `url` with curl, in any POSIX shell. */
export function curl(url, body, withKey) {
  const key = withKey ? ' \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"' : "";
  // What stands between the marks is JSON, where every line break of a text is escaped: none is the mark.
  return `curl -N ${quoted(url)} \\
  -H "Content-Type: application/json"${key} \\
  --data-binary @- <<'JSON'
${JSON.stringify(body, null, 2)}
JSON
`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** `body` with OpenAI's client for Python. */
export function python(baseUrl, body, withKey) {
  const { decar, ...known } = body;
  const [call, text] = body.messages
    ? ["chat.completions", 'choice.delta.content or ""']
    : ["completions", "choice.text"];
  const given = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value, 1)},\n`);
  const key = withKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  return `${withKey ? "import os\n\n" : ""}import openai

client = openai.OpenAI(base_url=${literal(baseUrl)}, api_key=${key})
stream = client.${call}.create(
${given.join("")}    extra_body={"decar": ${literal(decar, 1)}},
)
for chunk in stream:
    for choice in chunk.choices:
        print(${text}, end="", flush=True)
print()
`;
}

/** A JSON value in Python. JSON's escapes within strings are Python's too. */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const parts = Array.isArray(value)
    ? value.map((each) => literal(each, depth + 1))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (parts.join(", ").length < 80 && !parts.some((part) => part.includes("\n"))) {
    return open + parts.join(", ") + close;
  }
  const indent = "    ".repeat(depth);
  return `${open}\n${parts.map((part) => `${indent}    ${part},\n`).join("")}${indent}${close}`;
}

/** The same with the addresses of images cut to what can be read. */
export function shortened(code) {
  return code.replaceAll(/data:image\/[^"]*/g, (url) => (url.length > LONG ? `${url.slice(0, LONG)}…` : url));
}
