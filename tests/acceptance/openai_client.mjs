// The main path of the official Node client: models, completions, a stream, a file, a batch, its output.
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const greedy = { model: "demo", temperature: 0, max_tokens: 12 };

const models = [];
for await (const model of client.models.list()) models.push(model.id);

const whole = await client.completions.create({ ...greedy, prompt: "17 + 58 =" });

let streamed = "";
const stream = await client.completions.create({ ...greedy, prompt: "reverse stone =", stream: true });
for await (const chunk of stream) streamed += chunk.choices[0].text;

const asked = { model: "demo", input: "17 + 58 =", temperature: 0, max_output_tokens: 90 };
const response = (await client.responses.create(asked)).output_text;
let events = "";
for await (const event of await client.responses.create({ ...asked, stream: true }))
  if (event.type === "response.output_text.delta") events += event.delta;

const lines = { a: "17 + 58 =", b: "reverse stone =" };
const content = Object.entries(lines)
  .map(([custom_id, prompt]) =>
    JSON.stringify({ custom_id, method: "POST", url: "/v1/completions", body: { ...greedy, prompt } }))
  .join("\n");
const file = await client.files.create({ file: await toFile(Buffer.from(content), "in.jsonl"), purpose: "batch" });
let batch = await client.batches.create({
  input_file_id: file.id, endpoint: "/v1/completions", completion_window: "24h",
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  batch = await client.batches.retrieve(batch.id);
}
const answers = {};
const output = await (await client.files.content(batch.output_file_id)).text();
for (const line of output.trim().split("\n").map((text) => JSON.parse(text)).sort((x, y) => (x.custom_id < y.custom_id ? -1 : 1)))
  answers[line.custom_id] = line.response.body.choices[0].text;

console.log(JSON.stringify({ models, text: whole.choices[0].text, streamed, response, events, status: batch.status, answers }));
