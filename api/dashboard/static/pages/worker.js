// One worker: its figures, its last day, and the lines it runs.
import { get } from "../api.js";
import { count, duration, exact, short, shortId } from "../format.js";
import { stateIcon } from "../icons.js";
import { chart } from "../parts/chart.js";
import { problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { changed } from "../store.js";
import { isLive, kvBar, prefixShare, workerActions } from "./fleet.js";

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
    title: () => (page.worker ? page.worker.name : "Worker"),
    load,
    refresh,
    view(now) {
      const { worker } = page;
      if (page.problem) return h("div", { class: "panel" }, problem(page.problem, load));
      if (!worker) return h("h1", { class: "sr" }, "Worker");
      return [
        h("nav", { class: "crumb", "aria-label": "Where you are" }, h("a", { href: "/fleet" }, "Fleet"), "/", h("span", null, shortId(id))),
        h("div", { class: "head" }, h("span", { class: `badge ${isLive(worker) ? "ok" : "fail"}` }, stateIcon(isLive(worker) ? "completed" : "lost"), worker.status), h("h1", null, worker.name), h("div", { class: "acts" }, workerActions(worker, put))),
        figures(worker, now),
        day(worker),
        lines(worker, now),
      ];
    },
  };
}

function figures(worker, now) {
  const fact = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));
  return h(
    "dl",
    { class: "figures panel body" },
    fact("Model", worker.models.length > 1 ? `${worker.model}, in turn with ${worker.models.filter((model) => model !== worker.model).join(", ")}` : worker.model), fact("Device", worker.device),
    fact("Running / waiting", `${count(worker.running)} / ${count(worker.waiting)}`),
    fact("Seats", count(worker.seats)),
    fact("KV cache", kvBar(worker)),
    fact("Generated", `${short(worker.tokens_per_s)} tok/s`),
    fact("From the prefix cache", prefixShare(worker)),
    fact("Preemptions", exact(worker.preemptions)),
    fact("Up", duration(Math.floor((worker.ended_at ?? now) - worker.started_at))),
  );
}

const CURVES = [["tokens_per_s", "Tokens per second"], ["running", "Running at once"], ["kv_usage", "KV cache, share in use"], ["preemptions", "Preemptions a minute"]];

function day(worker) {
  return CURVES.map(([name, title]) => {
    const points = worker.minutes.map((minute) => ({ at: minute.at, value: minute[name] }));
    return h("section", { key: name, class: "panel", "aria-label": title }, h("header", null, h("h2", null, title)), chart({ points, label: title, unit: title, isRunning: isLive(worker) }));
  });
}

function lines({ lines: rows }, now) {
  return h(
    "section",
    { class: "panel", "aria-label": "Lines it runs" },
    h("header", null, h("h2", null, rows.length ? `Runs ${count(rows.length)}${rows.length === 100 ? " or more" : ""} lines of yours` : "Runs no line of yours now")),
    rows.length > 0 &&
      h(
        "table",
        { class: "res" },
        h("thead", null, h("tr", null, h("th", { class: "num" }, "Line"), h("th", null, "Job"), h("th", null, "Since"))),
        h("tbody", null, rows.map((row) => h("tr", { key: `${row.job}-${row.line}` }, h("td", { class: "num" }, h("a", { href: `/jobs/${row.job}/lines/${row.line}` }, exact(row.line))), h("td", null, h("a", { href: `/jobs/${row.job}` }, shortId(row.job))), h("td", { class: "muted" }, row.claimed_at && duration(Math.max(0, Math.floor(now - row.claimed_at))))))),
      ),
  );
}
