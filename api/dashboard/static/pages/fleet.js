// The workers: what each runs, how full it is, how fast, and when it was last heard of.
import { get, post } from "../api.js";
import { brief, count, share, short, time } from "../format.js";
import { stateIcon } from "../icons.js";
import { answers } from "../parts/answers.js";
import { ask, command, greyRows, problem } from "../parts/dialog.js";
import { spark } from "../parts/job.js";
import { h } from "../parts/render.js";
import { changed, isOperator, toast } from "../store.js";

export const isLive = (worker) => !worker.ended_at && worker.state !== "lost";
export const workerName = (worker) => worker.name ?? `${worker.host}:${worker.pid}`;
const seen = (worker) => worker.heartbeat_at ?? worker.last_seen_at ?? worker.seen_at;

/** Drain, take it back, or stop; each heartbeat brings the wish to the worker. */
export async function wishFor(action, worker, put) {
  if (action === "stop") {
    const running = worker.stats?.running ?? worker.running ?? 0;
    const sure = await ask({ title: `Stop ${workerName(worker)}?`, body: h("p", null, running ? `It gives its ${count(running)} running lines back at once; another worker runs them.` : "It runs nothing now."), accept: "Stop it", danger: true });
    if (!sure) return;
  }
  const before = worker.wanted;
  put({ ...worker, wanted: action === "undrain" ? null : action });
  try {
    put(await post(`/v1/workers/${worker.id}/${action}`));
    const text = { drain: "claims nothing more and ends when it is empty", undrain: "claims lines again", stop: "stops" }[action];
    toast(`${workerName(worker)} ${text}`, { undo: action === "drain" ? () => wishFor("undrain", worker, put) : null });
  } catch (failure) {
    put({ ...worker, wanted: before });
    toast(failure.message, { bad: true });
  }
}

export function workerActions(worker, put) {
  if (!isOperator() || !isLive(worker)) return null;
  const button = (text, action, danger) => h("button", { class: `btn sm ${danger ? "danger" : ""}`, type: "button", "aria-label": `${text} ${workerName(worker)}`, onclick: () => wishFor(action, worker, put) }, text);
  return h("div", { class: "btns" }, worker.wanted === "drain" ? button("Undrain", "undrain") : worker.wanted !== "stop" && button("Drain", "drain"), worker.wanted !== "stop" && button("Stop…", "stop", true));
}

export function open() {
  const page = { workers: null, problem: null };

  async function refresh() {
    page.workers = (await get("/v1/workers")).data;
    page.problem = null;
    changed();
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });

  function put(worker) {
    if (!page.workers) return;
    const place = page.workers.findIndex((other) => other.id === worker.id);
    if (place < 0) page.workers.push(worker);
    else page.workers[place] = { ...page.workers[place], ...worker };
    changed();
  }

  return {
    title: () => "Fleet",
    load,
    refresh,
    watch: () => ({ topics: ["overview", "workers"], refresh, onEvent: (name, data) => name === "worker" && put(data) }),
    view: (now) => {
      const alive = (page.workers ?? []).filter(isLive);
      const gone = (page.workers ?? []).filter((worker) => !isLive(worker));
      return [
        h("h1", { class: "sr" }, "Fleet"),
        answers(now),
        page.problem && h("div", { class: "panel" }, problem(page.problem, load)),
        page.workers && alive.length > 0 && totals(alive),
        page.workers && !page.workers.length
          ? h("div", { class: "panel empty" }, h("h2", null, "No worker has come up yet"), h("p", { class: "muted" }, "This starts one on a machine that reaches the database:"), command("pagemill worker --model PATH_OR_ID", "the command"))
          : h(
              "section",
              { class: "panel", "aria-label": "Workers" },
              h(
                "table",
                { class: "stack" },
                h("caption", { class: "sr" }, "Workers, and those that ended in the last hour"),
                h("thead", null, h("tr", null, ["Worker", "Model", "Device"].map((text) => h("th", null, text)), h("th", { class: "num" }, "Run / wait"), h("th", null, "KV"), h("th", { class: "num" }, "Prefix"), h("th", { class: "num" }, "tok/s"), h("th", { class: "num" }, "Beat"), h("th", null, h("span", { class: "sr" }, "Actions")))),
                h("tbody", null, page.workers ? [...alive.map((worker) => row(worker, now, put)), ...gone.map((worker) => lost(worker))] : greyRows(3, 8)),
              ),
            ),
      ];
    },
  };
}

function totals(alive) {
  const sum = (of) => alive.reduce((total, worker) => total + (of(worker) ?? 0), 0);
  const seats = sum((worker) => worker.seats);
  const prompt = sum((worker) => worker.stats?.prompt_tokens);
  const figure = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));
  return h(
    "dl",
    { class: "figures" },
    figure("Busy", share(sum((worker) => worker.busy) / alive.length)),
    figure("Seats", `${count(sum(running))} of ${seats ? count(seats) : "–"}`),
    figure("KV cache", share(sum(kvOf) / alive.length)),
    figure("Generated", `${short(sum((worker) => worker.tokens_per_s))} tok/s`),
    prompt > 0 && figure("From the prefix cache", share(sum((worker) => worker.stats?.cached_tokens) / prompt)),
  );
}

const running = (worker) => worker.stats?.running ?? worker.running ?? 0;
const kvOf = (worker) => worker.stats?.kv_usage ?? worker.kv_usage ?? 0;

export function kvBar(worker) {
  const used = kvOf(worker);
  return h("div", { class: "kv" }, h("svg", { class: "bar", preserveAspectRatio: "none", "aria-hidden": "true" }, h("rect", { class: "d", width: `${(used * 100).toFixed(1)}%`, height: "100%" })), h("span", { class: "fig small" }, share(used)));
}

function row(worker, now, put) {
  const { stats = {} } = worker;
  const wish = { drain: "draining", stop: "stopping" }[worker.wanted];
  return h(
    "tr",
    { key: worker.id },
    h("td", null, h("div", { class: "jobname" }, h("span", { class: wish ? "wait" : "ok", title: wish ?? "live" }, stateIcon(wish ? "waiting" : "completed"), h("span", { class: "sr" }, wish ?? "live")), h("a", { class: "t", href: `/fleet/${worker.id}` }, workerName(worker)), wish && h("span", { class: "wait small" }, wish))),
    h("td", { class: "small muted" }, worker.model),
    h("td", { class: "small muted" }, worker.device),
    h("td", { class: "num", "data-label": "run / wait" }, `${count(running(worker))} / ${count(stats.waiting ?? 0)}`),
    h("td", { "data-label": "KV" }, kvBar(worker)),
    h("td", { class: "num", "data-label": "prefix" }, stats.prompt_tokens ? share(stats.cached_tokens / stats.prompt_tokens) : "–"),
    h("td", { class: "num c-rate" }, h("div", { class: "rate" }, spark(worker.spark), h("span", null, short(worker.tokens_per_s ?? 0)))),
    h("td", { class: "num muted small", "data-label": "beat" }, seen(worker) ? `${brief(Math.max(0, Math.floor(now - seen(worker))))} ago` : "–"),
    h("td", { class: "num wide" }, workerActions(worker, put)),
  );
}

function lost(worker) {
  const why = { lost: `lost ${time(worker.ended_at)}, its lease ran out`, stopped: `stopped ${time(worker.ended_at)}`, broken: `broken ${time(worker.ended_at)}` }[worker.end_reason] ?? `ended ${time(worker.ended_at)}`;
  return h(
    "tr",
    { key: worker.id, class: "lost" },
    h("td", { colspan: 9, class: "wide" }, h("div", { class: "jobname" }, h("span", { class: worker.end_reason === "stopped" ? "idle" : "fail" }, stateIcon("lost")), h("a", { class: "t", href: `/fleet/${worker.id}` }, workerName(worker)), h("span", { class: "small" }, why, worker.freed ? `; its ${count(worker.freed)} lines run elsewhere` : ""))),
  );
}

