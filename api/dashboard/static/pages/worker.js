// One worker: its figures, its last day, and the lines it runs.
import { get } from "../api.js";
import { count, duration, exact, share, short, shortId, time } from "../format.js";
import { stateIcon } from "../icons.js";
import { chart } from "../parts/chart.js";
import { problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { changed } from "../store.js";
import { isLive, kvBar, workerActions, workerName } from "./fleet.js";

export function open({ id }) {
  const page = { worker: null, problem: null };
  const put = (worker) => { page.worker = { ...page.worker, ...worker }; changed(); };

  async function refresh() {
    put(await get(`/v1/workers/${id}`));
    page.problem = null;
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });

  return {
    key: id,
    back: "/fleet",
    title: () => (page.worker ? workerName(page.worker) : "Worker"),
    load,
    refresh,
    watch: () => ({ topics: ["overview", "workers"], refresh, onEvent: (name, data) => name === "worker" && data.id === id && put(data) }),
    view(now) {
      const { worker } = page;
      if (page.problem) return h("div", { class: "panel" }, problem(page.problem, load));
      if (!worker) return h("h1", { class: "sr" }, "Worker");
      return [
        h("nav", { class: "crumb", "aria-label": "Where you are" }, h("a", { href: "/fleet" }, "Fleet"), "/", h("span", null, shortId(id))),
        h("div", { class: "head" }, h("span", { class: `badge ${isLive(worker) ? "ok" : "fail"}` }, stateIcon(isLive(worker) ? "completed" : "lost"), isLive(worker) ? ({ drain: "Draining", stop: "Stopping" }[worker.wanted] ?? "Live") : (worker.end_reason ?? "ended")), h("h1", null, workerName(worker)), h("div", { class: "acts" }, workerActions(worker, put))),
        figures(worker, now),
        day(worker),
        lines(worker, now),
      ];
    },
  };
}

function figures(worker, now) {
  const { stats = {} } = worker;
  const fact = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));
  return h(
    "dl",
    { class: "figures panel body" },
    fact("Model", worker.model), fact("Device", worker.device ?? "–"),
    fact("Running / waiting", `${count(stats.running ?? 0)} / ${count(stats.waiting ?? 0)}`),
    worker.seats > 0 && fact("Seats", count(worker.seats)),
    fact("KV cache", kvBar(worker)),
    fact("Generated", `${short(worker.tokens_per_s ?? 0)} tok/s`),
    stats.prompt_tokens > 0 && fact("From the prefix cache", share(stats.cached_tokens / stats.prompt_tokens)),
    stats.preemptions !== undefined && fact("Preemptions", exact(stats.preemptions)),
    fact("Up", duration(Math.floor((worker.ended_at ?? now) - worker.started_at))),
  );
}

function day(worker) {
  const minutes = worker.minutes ?? worker.history;
  if (!minutes?.length) return null;
  const points = minutes.map((minute) => ({ at: minute.at, value: minute.tokens_per_s ?? minute.completion_tokens / 60 }));
  return h("section", { class: "panel", "aria-label": "Tokens per second" }, h("header", null, h("h2", null, "Tokens per second")), chart({ points, label: "Tokens per second", unit: "tok/s", isRunning: isLive(worker) }));
}

function lines(worker, now) {
  const rows = worker.lines ?? [];
  return h(
    "section",
    { class: "panel", "aria-label": "Lines it runs" },
    h("header", null, h("h2", null, rows.length ? `Runs ${count(rows.length)} lines` : "Runs nothing now")),
    rows.length > 0 &&
      h(
        "table",
        { class: "res" },
        h("thead", null, h("tr", null, h("th", { class: "num" }, "Line"), h("th", null, "Job"), h("th", null, "Since"))),
        h("tbody", null, rows.slice(0, 100).map((row) => h("tr", { key: `${row.job}-${row.line}` }, h("td", { class: "num" }, row.job ? h("a", { href: `/jobs/${row.job}/lines/${row.line}` }, exact(row.line)) : exact(row.line)), h("td", null, row.job ? h("a", { href: `/jobs/${row.job}` }, row.name ?? shortId(row.job)) : h("span", { class: "faint" }, "another tenant's")), h("td", { class: "muted" }, row.claimed_at ? `${duration(Math.max(0, Math.floor(now - row.claimed_at)))}` : time(row.claimed_at))))),
      ),
  );
}
