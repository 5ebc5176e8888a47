// The openai package of npm: chats, completions, responses; whole and streamed; structured answers, tools, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { DECAR_URL, DECAR_KEY, DECAR_MODEL: model } = process.env;
const client = new OpenAI({ baseURL: `${DECAR_URL}/v1`, apiKey: DECAR_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "How many are 1 and 2?" }];
const names = [];
for await (const each of await client.models.list()) names.push(each.id);
assert.deepEqual(names, [model, `${model}/code`, `${model}/prose`]);

for (const name of [model, `${model}/code`]) {
  const whole = await client.chat.completions.create({ model: name, messages, max_tokens: 8, decar: { trace: true } });
  assert.equal(whole.model, name);
  assert.equal(whole.choices[0].decar.weights.length, 8);
  let text = "";
  const stream = await client.chat.completions.create({ model: name, messages, max_tokens: 8, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.model, name);
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, whole.choices[0].message.content);
  const response = await client.responses.create({ model: name, input: "Hi", max_output_tokens: 8 });
  assert.equal(response.model, name);
  const final = await client.responses.stream({ model: name, input: "Hi", max_output_tokens: 8 }).finalResponse();
  assert.equal(final.output_text, response.output_text);
}

const completion = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 4, logprobs: 2 });
assert.equal(completion.choices.length, 2);

const schema = { type: "object", properties: { a: { type: "integer" } }, required: ["a"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "sum", strict: true, schema } };
const parsed = await client.chat.completions.parse({ model, messages, response_format: format });
assert.deepEqual(parsed.choices[0].message.parsed, { a: 3 });
const tools = [{ type: "function", function: { name: "add", parameters: schema } }];
const called = await client.chat.completions.create({ model, messages, tools, tool_choice: "required" });
assert.equal(called.choices[0].message.tool_calls[0].function.name, "add");

await assert.rejects(client.chat.completions.create({ model: "stranger", messages }), OpenAI.NotFoundError);
await assert.rejects(
  client.chat.completions.create({ model, messages, decar: { weights: { x: 1 } } }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "decar.weights",
);
const stranger = new OpenAI({ baseURL: `${DECAR_URL}/v1`, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
console.log("remark: models, chats, completions, responses, structured answers, tools, errors");
