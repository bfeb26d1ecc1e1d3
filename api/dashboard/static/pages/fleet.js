// The workers: what each runs, how full it is, how fast, and when it was last heard of.
import { get, post } from "../api.js";
import { brief, count, share, short, time } from "../format.js";
import { stateIcon } from "../icons.js";
import { answers } from "../parts/answers.js";
import { ask, command, greyRows, problem } from "../parts/dialog.js";
import { spark } from "../parts/job.js";
import { h } from "../parts/render.js";
import { changed, isOperator, toast } from "../store.js";

export const isLive = (worker) => worker.ended_at === null;

/** Drain, take it back, or stop; each heartbeat brings the wish to the worker. */
export async function wishFor(action, worker, put) {
  if (action === "stop") {
    const running = worker.running;
    const sure = await ask({ title: `Stop ${worker.name}?`, body: h("p", null, running ? `It gives its ${count(running)} running lines back at once; another worker runs them.` : "It runs nothing now."), accept: "Stop it", danger: true });
    if (!sure) return;
  }
  put({ ...worker, status: { drain: "draining", undrain: "live", stop: "stopping" }[action] });
  try {
    put(await post(`/v1/workers/${worker.id}/${action}`));
    const text = { drain: "claims nothing more and ends when it is empty", undrain: "claims lines again", stop: "stops" }[action];
    toast(`${worker.name} ${text}`, { undo: action === "drain" ? () => wishFor("undrain", worker, put) : null });
  } catch (failure) {
    put(worker);
    toast(failure.message, { bad: true });
  }
}

export function workerActions(worker, put) {
  if (!isOperator() || !isLive(worker)) return null;
  const button = (text, action, danger) => h("button", { class: `btn sm ${danger ? "danger" : ""}`, type: "button", "aria-label": `${text} ${worker.name}`, onclick: () => wishFor(action, worker, put) }, text);
  return h("div", { class: "btns" }, worker.status === "draining" ? button("Undrain", "undrain") : worker.status !== "stopping" && button("Drain", "drain"), worker.status !== "stopping" && button("Stop…", "stop", true));
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
    topics: ["workers"],
    on(event, data) {
      if (event === "workers") page.workers = data.data;
    },
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
  const sum = (name) => alive.reduce((total, worker) => total + worker[name], 0);
  const figure = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));
  return h(
    "dl",
    { class: "figures" },
    figure("Busy", share(sum("busy") / alive.length)),
    figure("Seats", `${count(sum("running"))} of ${count(sum("seats"))}`),
    figure("KV cache", share(sum("kv_usage") / alive.length)),
    figure("Generated", `${short(sum("tokens_per_s"))} tok/s`),
    sum("prompt_tokens") > 0 && figure("From the prefix cache", share(sum("cached_tokens") / sum("prompt_tokens"))),
  );
}

export function kvBar({ kv_usage: used }) {
  return h("div", { class: "kv" }, h("svg", { class: "bar", preserveAspectRatio: "none", "aria-hidden": "true" }, h("rect", { class: "d", width: `${(used * 100).toFixed(1)}%`, height: "100%" })), h("span", { class: "fig small" }, share(used)));
}

export const prefixShare = (worker) => (worker.prompt_tokens ? share(worker.cached_tokens / worker.prompt_tokens) : "–");

function row(worker, now, put) {
  const leaves = worker.status !== "live";
  return h(
    "tr",
    { key: worker.id },
    h("td", null, h("div", { class: "jobname" }, h("span", { class: leaves ? "wait" : "ok", title: worker.status }, stateIcon(leaves ? "waiting" : "completed"), h("span", { class: "sr" }, worker.status)), h("a", { class: "t", href: `/fleet/${worker.id}` }, worker.name), leaves && h("span", { class: "wait small" }, worker.status))),
    h("td", { class: "small muted", title: worker.models.join(", ") }, worker.model, worker.models.length > 1 && ` (1 of ${worker.models.length})`),
    h("td", { class: "small muted" }, worker.device),
    h("td", { class: "num", "data-label": "run / wait" }, `${count(worker.running)} / ${count(worker.waiting)}`),
    h("td", { "data-label": "KV" }, kvBar(worker)),
    h("td", { class: "num", "data-label": "prefix" }, prefixShare(worker)),
    h("td", { class: "num c-rate" }, h("div", { class: "rate" }, spark(worker.spark), h("span", null, short(worker.tokens_per_s)))),
    h("td", { class: "num muted small", "data-label": "beat" }, `${brief(Math.max(0, Math.floor(now - worker.heartbeat_at)))} ago`),
    h("td", { class: "num wide" }, workerActions(worker, put)),
  );
}

function lost(worker) {
  const why = { lost: ", its lease ran out", broken: ", its engine failed" }[worker.status] ?? "";
  return h(
    "tr",
    { key: worker.id, class: "lost" },
    h("td", { colspan: 9, class: "wide" }, h("div", { class: "jobname" }, h("span", { class: worker.status === "stopped" ? "idle" : "fail" }, stateIcon("lost")), h("a", { class: "t", href: `/fleet/${worker.id}` }, worker.name), h("span", { class: "small" }, `${worker.status} ${time(worker.ended_at)}${why}`, worker.freed > 0 && `; its ${count(worker.freed)} lines run elsewhere`))),
  );
}
