// One line: what became of it in a sentence, prompt beside answer, where its time went, and running it again.
import { get, ndjson, post } from "../api.js";
import { count, duration, exact, plural, shortId, time, visible } from "../format.js";
import { clockIcon, failIcon, stateIcon } from "../icons.js";
import { copy, copyButton, problem } from "../parts/dialog.js";
import { phases } from "../parts/phases.js";
import { h } from "../parts/render.js";
import { curlOf } from "../parts/starters.js";
import { go } from "../router.js";
import { canWrite, changed, toast } from "../store.js";

const POLL = 1000;

export function open({ id, line }) {
  const number = Number(line);
  const page = { job: null, line: null, problem: null, edit: null, again: null };

  async function refresh() {
    [page.job, page.line] = await Promise.all([get(`/v1/jobs/${id}`), get(`/v1/jobs/${id}/lines/${number}`)]);
    page.problem = null;
    changed();
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });
  const step = (by) => () => {
    const next = number + by;
    if (next >= 1 && (!page.job || next <= page.job.request_counts.total)) go(`/jobs/${id}/lines/${next}`);
  };

  async function run() {
    const { prompt, max_tokens, temperature } = page.edit;
    const given = page.line.params ?? {};
    const body = {
      model: page.job.model, name: `line ${number} again`, priority: 50,
      prompts: [{ ...given, max_tokens, temperature, ...(isChat(page.line) ? { messages: JSON.parse(prompt) } : { prompt }) }],
    };
    try {
      page.again = { job: await post("/v1/jobs", body), text: null };
      changed();
      const look = async () => {
        const job = await get(`/v1/jobs/${page.again.job.id}`);
        if (!job.ended_at) return void setTimeout(look, POLL);
        const { lines } = await ndjson(`/v1/jobs/${job.id}/results`);
        page.again.text = resultText(lines[0]);
        return changed();
      };
      await look();
    } catch (failure) {
      toast(failure instanceof SyntaxError ? "The messages are no JSON" : failure.message, { bad: true });
    }
  }

  const startEdit = () => {
    const params = page.line.params ?? {};
    page.edit = { prompt: isChat(page.line) ? JSON.stringify(page.line.messages, null, 2) : promptText(page.line), max_tokens: params.max_tokens ?? 256, temperature: params.temperature ?? 1 };
    changed();
  };

  return {
    key: `${id}-${number}`,
    back: `/jobs/${id}`,
    title: () => `line ${exact(number)}`,
    load,
    refresh,
    keys: { "[": step(-1), "]": step(1), y: () => page.line && copy(curlOfLine(page), "as curl") },
    view(now) {
      const crumb = h("nav", { class: "crumb", "aria-label": "Where you are" }, h("a", { href: "/" }, "Jobs"), "/", h("a", { href: `/jobs/${id}` }, page.job?.name ?? shortId(id)), "/", h("span", null, `line ${exact(number)}`));
      if (page.problem) return [crumb, h("div", { class: "panel" }, problem(page.problem, load))];
      const total = page.job?.request_counts.total;
      return [
        crumb,
        h(
          "div",
          { class: "head" },
          h("h1", null, `Line ${exact(number)}`, page.line?.custom_id && h("span", { class: "muted" }, " ", h("bdi", null, page.line.custom_id))),
          h(
            "div",
            { class: "acts" },
            h("button", { class: "btn", type: "button", "aria-label": "Previous line", disabled: number <= 1, onclick: step(-1) }, "←"),
            h("button", { class: "btn", type: "button", "aria-label": "Next line", disabled: total !== undefined && number >= total, onclick: step(1) }, "→"),
            page.line && copyButton(curlOfLine(page), "as curl", "Copy curl"),
            page.line && canWrite() && h("button", { class: "btn", type: "button", onclick: startEdit }, "Edit, run again"),
          ),
        ),
        page.line && content(page, number, now, run),
      ];
    },
  };
}

const isChat = (line) => Array.isArray(line?.messages);
const isEnded = (line) => line && !["pending", "running"].includes(line.state);

function promptText(line) {
  if (typeof line.prompt === "string") return line.prompt;
  return JSON.stringify(line.prompt ?? line.messages ?? null);
}

/** The text of a stored result line. */
function resultText(result) {
  const body = result?.response?.body;
  const choice = body?.choices?.[0];
  if (!choice) return (result?.error ?? body?.error)?.message ?? "";
  return choice.text ?? choice.message?.content ?? JSON.stringify(choice.message?.tool_calls ?? "");
}

const curlOfLine = (page) => curlOf({ model: page.job?.model, prompts: [{ ...page.line.params, ...(isChat(page.line) ? { messages: page.line.messages } : { prompt: page.line.prompt }) }] });

/** Where the newest claim of it is. */
const placeOf = (line) => line.claims.at(-1)?.host;

function outcome(line, now) {
  const by = placeOf(line) ? ` on ${placeOf(line)}` : "";
  const took = line.timing.ran_ms === null ? "" : ` in ${duration(line.timing.ran_ms / 1000)}`;
  const after = line.settled_at === null ? "" : `, ${duration(Math.max(0, line.settled_at - line.sent_at))} after it was sent`;
  switch (line.state) {
    case "completed":
      return [h("span", { class: "ok" }, stateIcon("completed")), `Answered${took}${by}${after}`];
    case "running":
      return [h("span", { class: "run" }, stateIcon("running", 0.5)), `Running${by} for ${duration(Math.max(0, Math.floor(now - line.claimed_at)))}`];
    case "pending":
      return [h("span", { class: "wait" }, clockIcon()), `Waits for a worker to take it, for ${duration(Math.max(0, Math.floor(now - line.sent_at)))}`];
    case "cancelled":
    case "expired":
      return [h("span", { class: "idle" }, stateIcon(line.state)), `${line.state[0].toUpperCase()}${line.state.slice(1)} before it had an answer`];
    default:
      return [h("span", { class: "fail" }, failIcon()), `Failed${took}${by}: ${errorOf(line)?.message ?? "no reason was stored"}`];
  }
}

const errorOf = (line) => line.result?.error ?? line.result?.response?.body?.error;

function tokensOf(line) {
  const usage = line.result?.response?.body?.usage ?? {};
  return { ...usage, cached_tokens: usage.prompt_tokens_details?.cached_tokens };
}

function content(page, number, now, run) {
  const { line } = page;
  const answer = resultText(line.result);
  const tokens = tokensOf(line);
  const finish = line.result?.response?.body?.choices?.[0]?.finish_reason;
  const deaths = line.claims.at(-1)?.deaths ?? 0;
  return [
    h("p", { class: "outcome" }, outcome(line, now)),
    line.claims.length > 0 && line.claims.at(-1).number > 1 && h("p", { class: "hint" }, `Claimed ${line.claims.at(-1).number} times${deaths ? `; ${plural(deaths, "worker")} ended while it ran there` : ""}.`),
    earlierClaims(line),
    h(
      "div",
      { class: "pair" },
      section("Prompt", [tokens.prompt_tokens && plural(tokens.prompt_tokens, "token"), tokens.cached_tokens && `${count(tokens.cached_tokens)} cached`], copyButton(promptText(line), "the prompt"), prompt(page, run)),
      section("Answer", [tokens.completion_tokens && plural(tokens.completion_tokens, "token"), finish], answer && copyButton(answer, "the answer"), answerShown(page, answer, line)),
    ),
    isEnded(line) && h("section", { class: "panel", "aria-label": "Timeline" }, h("header", null, h("h2", null, "Timeline")), phases(line, tokens, { label: `Timeline of line ${exact(number)}` })),
    section("Parameters", [], null, h("dl", { class: "facts wide" }, facts(line))),
  ];
}

const ENDS = { lost: "lost", given_back: "given back" };

/** The claims of which something is noted: those that brought no result, and one that ran alone. */
function earlierClaims(line) {
  const noted = line.claims.filter((claim) => claim.end || claim.is_alone);
  if (!noted.length) return null;
  return h(
    "section",
    { class: "panel", "aria-label": "Earlier claims" },
    h("header", null, h("h2", null, "Earlier claims")),
    h("ol", { class: "body steps small" }, noted.map((claim) =>
      h(
        "li",
        { key: claim.number, class: claim.end === "lost" ? "fail" : "" },
        `claim ${claim.number}: `,
        h("a", { class: "link", href: workerPage(claim.worker) }, claim.host ?? shortId(claim.worker)),
        claim.is_alone && ", ran alone",
        claim.end && `, ${ENDS[claim.end]} at ${time(claim.ended_at, { seconds: true })}`,
      ),
    )),
  );
}

const workerPage = (worker) => `/fleet/worker_${worker.replaceAll("-", "")}`;

const section = (name, notes, button, body) =>
  h("section", { class: "panel", "aria-label": name }, h("header", null, h("h2", null, name), h("span", { class: "muted small" }, notes.filter(Boolean).join(", ")), h("span", { class: "sp" }), button), h("div", { class: "body" }, body));

function facts(line) {
  const claim = line.claims.at(-1) ?? {};
  const all = { model: line.model, ...line.params, "settled as seq": line.seq, claim: claim.number, worker: claim.worker, device: claim.device, settled: line.settled_at && time(line.settled_at, { seconds: true }) };
  return Object.entries(all)
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => {
      if (name === "worker") return [h("dt", null, name), h("dd", null, h("a", { class: "link", href: workerPage(value) }, claim.host ?? value))];
      const text = typeof value === "object" ? JSON.stringify(value) : String(value);
      return [h("dt", null, name), h("dd", { title: text }, text)];
    });
}

function prompt(page, run) {
  const { line, edit } = page;
  if (!edit) {
    return isChat(line)
      ? line.messages.map((message, place) => [h("p", { key: `role-${place}`, class: "role" }, message.role), h("div", { key: `text-${place}`, class: "text mono", dir: "auto", tabindex: 0 }, visible(typeof message.content === "string" ? message.content : JSON.stringify(message, null, 2)))])
      : h("div", { class: "text mono", dir: "auto", tabindex: 0, role: "group", "aria-label": "The prompt" }, visible(promptText(line)));
  }
  const number = (name, label, step) => h("label", { class: "field" }, h("span", null, label), h("input", { class: "input", type: "number", step, value: edit[name], oninput: (event) => (edit[name] = event.target.valueAsNumber) }));
  return h(
    "form",
    { class: "form", onsubmit: (event) => { event.preventDefault(); run(); } },
    h("label", { class: "field" }, h("span", null, isChat(line) ? "Messages, as JSON" : "Prompt"), h("textarea", { class: "input mono", rows: 8, value: edit.prompt, autofocus: true, oninput: (event) => (edit.prompt = event.target.value) })),
    h("div", { class: "params" }, number("max_tokens", "Tokens at most", 1), number("temperature", "Temperature", 0.1)),
    h("p", { class: "btns" }, h("button", { class: "btn main", type: "submit" }, "Run"), h("button", { class: "btn ghost", type: "button", onclick: () => { page.edit = page.again = null; changed(); } }, "Leave it")),
  );
}

function answerShown(page, answer, line) {
  const failure = errorOf(line);
  const old = failure ? h("p", { class: "text fail", dir: "auto" }, visible(failure.message)) : h("div", { class: "text mono", dir: "auto", tabindex: 0, role: "group", "aria-label": "The answer" }, visible(answer) || (isEnded(line) ? "(empty)" : "…"));
  if (!page.again) return old;
  const { text, job } = page.again;
  return [
    h("p", { class: "role" }, "before"), old,
    h("p", { class: "role" }, "again, as ", h("a", { class: "link", href: `/jobs/${job.id}` }, shortId(job.id))),
    text === null ? h("p", { class: "muted" }, "runs …") : h("div", { class: "text mono diff", dir: "auto", tabindex: 0, role: "group", "aria-label": "The new answer" }, text === answer ? [visible(text), h("span", { class: "muted" }, "\n(the same)")] : diff(answer ?? "", text)),
  ];
}

/** Words that were taken out and put in, by the longest common subsequence; long texts are shown whole. */
export function diff(before, after) {
  const a = before.split(/(?<=\s)/);
  const b = after.split(/(?<=\s)/);
  if (a.length * b.length > 1e6) return [visible(after)];
  const table = Array.from({ length: a.length + 1 }, () => new Uint32Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const parts = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) parts.push(visible(a[i++])), j++;
    else if (j < b.length && (i === a.length || table[i][j + 1] >= table[i + 1][j])) parts.push(h("ins", null, visible(b[j++])));
    else parts.push(h("del", null, visible(a[i++])));
  }
  return parts;
}
