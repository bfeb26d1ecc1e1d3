// A job by hand: paste or drop, see what it costs, send. What is typed is checked here before the service checks it.
import { address } from "../api.js";
import { bytes, count, duration, exact, plural, short } from "../format.js";
import { icon } from "../icons.js";
import { command, problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { curlOf, loadModels, pythonOf } from "../parts/starters.js";
import { go } from "../router.js";
import { canWrite, changed, state } from "../store.js";

const SAMPLE = 256 * 1024; // bytes of a file that are looked at
const MOST_TEXT = 200e6; // bytes of CSV or text that the page turns into lines
const TOKEN = 4; // characters, about

export function open() {
  const page = { text: "", file: null, sample: null, model: "", name: "", options: { max_tokens: 256, temperature: 1, priority: 0, window: "", webhook: "" }, problem: null, sent: null, isOver: false };

  async function load() {
    const models = await loadModels().catch(() => []);
    page.model ||= (models.find((one) => one.live_workers > 0) ?? models[0])?.id ?? "";
    changed();
  }

  async function take(file) {
    page.problem = null;
    const kind = file.name.split(".").pop().toLowerCase();
    let body = file;
    if (kind === "csv" || kind === "txt") {
      if (file.size > MOST_TEXT) {
        page.problem = { message: `${file.name} has ${bytes(file.size)}; the page turns up to ${bytes(MOST_TEXT)} of text into lines. Turn it into JSONL and drop that, or use: pagemill submit` };
        return changed();
      }
      const prompts = kind === "csv" ? csvPrompts(await file.text()) : (await file.text()).split("\n").filter((line) => line.trim());
      body = new Blob(prompts.map((prompt) => `${JSON.stringify({ prompt })}\n`), { type: "application/x-ndjson" });
    }
    const head = await body.slice(0, SAMPLE).text();
    const isAll = body.size <= SAMPLE;
    const sample = look(isAll ? head : head.slice(0, head.lastIndexOf("\n") + 1));
    if (!isAll) sample.lines = Math.round((sample.lines * body.size) / sample.bytes);
    page.file = { name: file.name, body };
    page.sample = { ...sample, isExact: isAll };
    return changed();
  }

  const found = () => page.sample ?? look(page.text);
  const options = () => {
    const { max_tokens, temperature, priority, window, webhook } = page.options;
    return { max_tokens, temperature, priority, completion_window: window.trim(), webhook_url: webhook.trim(), name: page.name.trim() };
  };

  function send() {
    const request = new XMLHttpRequest();
    const body = page.file?.body ?? new Blob([toLines(page.text)]);
    page.sent = { done: 0, request };
    page.problem = null;
    request.open("POST", address("/v1/jobs", { model: page.model, ...options() }));
    request.setRequestHeader("content-type", "application/x-ndjson");
    request.setRequestHeader("x-pagemill-page", "1");
    request.upload.onprogress = (event) => { if (page.sent) page.sent.done = event.loaded / event.total; changed(); };
    request.onload = () => {
      const answer = JSON.parse(request.responseText || "{}");
      page.sent = null;
      if (request.status === 202) return go(`/jobs/${answer.id}`);
      page.problem = { message: answer.error?.message ?? `The service answered ${request.status}.`, requestId: request.getResponseHeader("x-request-id") };
      return changed();
    };
    request.onerror = () => {
      page.sent = null;
      page.problem = { message: "The service cannot be reached, or it refused the rest of the upload." };
      changed();
    };
    request.onabort = () => { page.sent = null; changed(); };
    request.send(body);
    changed();
  }

  const option = (name, event) => {
    const { value, valueAsNumber, type } = event.target;
    page.options[name] = type === "number" ? (Number.isNaN(valueAsNumber) ? "" : valueAsNumber) : value;
    changed();
  };
  const field = (label, control) => h("label", { class: "field" }, h("span", null, label), control);
  const number = (name, label, attributes) => field(label, h("input", { class: "input", type: "number", value: page.options[name], oninput: (event) => option(name, event), ...attributes }));

  return {
    title: () => "New job",
    back: "/",
    load,
    view() {
      if (!canWrite()) return h("div", { class: "panel empty" }, h("h1", null, "This key only reads"), h("p", { class: "muted" }, "A read-write key sends jobs."));
      const sample = found();
      const model = state.models.find((one) => one.id === page.model);
      const isReady = sample.lines > 0 && !sample.bad && page.model && !page.sent;
      return [
        h("div", { class: "head" }, h("h1", null, "New job")),
        h(
          "div",
          { class: "new-grid" },
          h(
            "form",
            { class: "form", onsubmit: (event) => { event.preventDefault(); if (isReady) send(); } },
            page.file ? fileShown(page, sample) : paste(page),
            drop(page, take),
            h("p", { class: sample.bad ? "fail" : "muted", role: "status" }, sample.bad ? `Line ${exact(sample.bad.line)}: ${sample.bad.why}` : cost(sample, model, page)),
            page.problem && problem(page.problem),
            page.sent && h("div", { class: "steps" }, h("progress", { value: page.sent.done, max: 1, "aria-label": "Sent" }), h("button", { class: "btn sm", type: "button", onclick: () => page.sent.request.abort() }, "Stop sending")),
            h("p", { class: "btns" }, h("button", { class: "btn main", type: "submit", disabled: !isReady }, sample.lines ? `Send ${sample.isExact === false ? "≈ " : ""}${count(sample.lines)}` : "Send")),
            commands(page, sample),
          ),
          h(
            "fieldset",
            { class: "panel body form" },
            field("Model", h("select", { class: "input", value: page.model, onchange: (event) => { page.model = event.target.value; changed(); } }, state.models.map((one) => h("option", { key: one.id, value: one.id }, `${one.id} · ${one.live_workers ? `${one.live_workers} live` : "no worker"}`)))),
            model && !model.live_workers && h("p", { class: "wait small" }, "No live worker serves it: the job waits until one does."),
            field("Name, for people", h("input", { class: "input", value: page.name, maxlength: 128, oninput: (event) => { page.name = event.target.value; changed(); } })),
            h("div", { class: "two" }, number("max_tokens", "Tokens at most", { min: 1 }), number("temperature", "Temperature", { min: 0, max: 10, step: 0.1 })),
            h("div", { class: "two" }, number("priority", "Priority", { min: -100, max: 100 }), field("Window, as 24h", h("input", { class: "input", value: page.options.window, placeholder: "none", pattern: "[0-9]{1,4}[mhd]", oninput: (event) => option("window", event) }))),
            field("Webhook", h("input", { class: "input", type: "url", value: page.options.webhook, placeholder: "https://…", oninput: (event) => option("webhook", event) })),
          ),
        ),
      ];
    },
  };
}

function paste(page) {
  return h("label", { class: "field" }, h("span", null, "Prompts: one a line, or JSON objects as in a JSONL file"), h("textarea", { class: "input mono", rows: 10, spellcheck: "false", value: page.text, placeholder: "17 + 58 =\nreverse stone =", oninput: (event) => { page.text = event.target.value; changed(); } }));
}

function fileShown(page, sample) {
  return h("div", { class: "panel body btns" }, icon("file"), h("b", null, page.file.name), h("span", { class: "muted" }, `${bytes(page.file.body.size)}, ${sample.isExact ? "" : "about "}${plural(sample.lines, "line")}`), h("span", { class: "sp" }), h("button", { class: "btn sm", type: "button", onclick: () => { page.file = page.sample = null; changed(); } }, "Take it out"));
}

function drop(page, take) {
  const over = (isOver) => (event) => { event.preventDefault(); page.isOver = isOver; changed(); };
  return h(
    "label",
    { class: page.isOver ? "drop over" : "drop", ondragover: over(true), ondragleave: over(false), ondrop: (event) => { over(false)(event); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); } },
    h("span", { class: "muted" }, "Drop a file here: .jsonl as it is, .csv by its column “prompt”, .txt by its lines"),
    h("input", { type: "file", accept: ".jsonl,.ndjson,.csv,.txt", "aria-label": "Choose a file", onchange: (event) => event.target.files[0] && take(event.target.files[0]) }),
  );
}

function cost(sample, model, page) {
  if (!sample.lines) return "Nothing yet.";
  const tokens = Math.round((sample.lines * sample.characters) / Math.max(1, sample.looked) / TOKEN);
  const perSecond = state.overview?.tokens_per_s;
  const made = sample.lines * (Number(page.options.max_tokens) || 0);
  return `${sample.isExact === false ? "≈ " : ""}${plural(sample.lines, "line")} ≈ ${short(tokens)} prompt tokens, ${short(made)} generated at most${perSecond ? `: at most about ${duration(Math.ceil(made / perSecond))} at today's rate` : ""}`;
}

function commands(page, sample) {
  const prompts = page.file ? ["…"] : toLines(page.text).split("\n").filter(Boolean).slice(0, 3).map((line) => { try { const item = JSON.parse(line); return Object.keys(item).length === 1 ? item.prompt : item; } catch { return line; } });
  const { max_tokens, temperature } = page.options;
  const body = { model: page.model, prompts: prompts.length ? prompts : ["17 + 58 ="], params: { max_tokens, temperature } };
  const upload = `curl "${location.origin}/v1/jobs?model=${encodeURIComponent(page.model)}&max_tokens=${max_tokens}&temperature=${temperature}" -H "Authorization: Bearer $PAGEMILL_API_KEY" -H 'Content-Type: application/x-ndjson' -T ${page.file?.name ?? "prompts.jsonl"} -X POST`;
  return [
    h("details", null, h("summary", null, "as curl"), command(page.file || sample.lines > 3 ? upload : curlOf(body), "the curl command")),
    h("details", null, h("summary", null, "as Python"), command(pythonOf(body), "the Python code")),
  ];
}

/** NDJSON of what was pasted: objects as they are, plain lines as prompts. */
export function toLines(text) {
  return text.split("\n").filter((line) => line.trim()).map((line) => (line.trim().startsWith("{") ? line.trim() : JSON.stringify({ prompt: line }))).join("\n");
}

/** Lines, characters of prompts, and the first line that is wrong, of NDJSON or plain text. */
export function look(text) {
  const found = { lines: 0, looked: 0, characters: 0, bytes: new Blob([text]).size, bad: null };
  text.split("\n").forEach((line, place) => {
    if (!line.trim() || found.bad) return;
    found.lines++;
    found.looked++;
    if (!line.trim().startsWith("{")) return void (found.characters += line.length);
    try {
      const item = JSON.parse(line);
      if (item.prompt === undefined && item.messages === undefined) throw new Error("it has neither “prompt” nor “messages”");
      found.characters += typeof item.prompt === "string" ? item.prompt.length : JSON.stringify(item.prompt ?? item.messages).length;
    } catch (failure) {
      found.bad = { line: place + 1, why: failure instanceof SyntaxError ? "it is no JSON object" : failure.message };
    }
  });
  return found;
}

/** The column `prompt` of a CSV file, or its first column. */
export function csvPrompts(text) {
  const rows = [[""]];
  let quoted = false;
  for (let place = 0; place < text.length; place++) {
    const character = text[place];
    const row = rows.at(-1);
    if (quoted) {
      if (character !== '"') row[row.length - 1] += character;
      else if (text[place + 1] === '"') row[row.length - 1] += text[++place];
      else quoted = false;
    } else if (character === '"') quoted = true;
    else if (character === ",") row.push("");
    else if (character === "\n") rows.push([""]);
    else if (character !== "\r") row[row.length - 1] += character;
  }
  const column = rows[0].findIndex((name) => name.trim().toLowerCase() === "prompt");
  return rows.slice(column < 0 ? 0 : 1).map((row) => row[Math.max(0, column)] ?? "").filter((prompt) => prompt.trim());
}
