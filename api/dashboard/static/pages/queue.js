// Who waits for which model, for how long, and which deadlines will be missed.
import { get } from "../api.js";
import { count, duration, short, time } from "../format.js";
import { answers } from "../parts/answers.js";
import { problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { changed } from "../store.js";

export function open() {
  const page = { models: null, problem: null };

  async function refresh() {
    page.models = (await get("/v1/queue")).data;
    page.problem = null;
    changed();
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });

  return {
    title: () => "Queue",
    load,
    refresh,
    topics: ["queue"],
    on(event, data) {
      if (event === "queue") page.models = data.data;
    },
    view: (now) => [
      h("h1", { class: "sr" }, "Queue"),
      answers(now),
      page.problem ? h("div", { class: "panel" }, problem(page.problem, load)) : page.models?.length === 0 && h("div", { class: "panel empty" }, h("h2", null, "Nothing waits"), h("p", { class: "muted" }, "Every line that was sent has its answer.")),
      (page.models ?? []).map((model) => block(model)),
    ],
  };
}

function block(model) {
  const { tenants, workers: alive } = model;
  const lines = tenants.reduce((sum, tenant) => sum + tenant.lines, 0);
  return h(
    "section",
    { key: model.model, class: "panel", "aria-label": model.model },
    h(
      "header",
      null,
      h("h2", null, model.model),
      alive
        ? h("span", { class: "muted small" }, `${alive} ${alive === 1 ? "worker" : "workers"} · ${short(model.tokens_per_s)} tok/s${model.seconds_to_empty ? ` · ≈ ${duration(model.seconds_to_empty)} to empty` : ""}`)
        : h("span", { class: "wait small" }, `no live worker${model.last_seen ? ` since ${time(model.last_seen)}` : ""}, ${count(lines)} lines wait`),
    ),
    late(tenants),
    h(
      "table",
      { class: "stack" },
      h("caption", { class: "sr" }, `Tenants that wait for ${model.model}`),
      h("thead", null, h("tr", null, h("th", null, "Tenant"), ["Jobs", "Lines", "≈ Tokens", "Oldest wait", "p50", "p95", "Due 1 h", "6 h", "24 h"].map((text) => h("th", { class: "num" }, text)))),
      h("tbody", null, tenants.map((tenant) => row(tenant))),
    ),
  );
}

function late(tenants) {
  const missed = tenants.filter((tenant) => Object.values(tenant.pressure).some((value) => value > 1));
  return missed.length > 0 && h("p", { class: "hint fail body" }, `More is due than the live workers make: ${missed.map((tenant) => tenant.tenant).join(", ")} will miss a deadline.`);
}

const cell = (label, text) => h("td", { class: "num", "data-label": label }, text);

function row(tenant) {
  const { pressure: due } = tenant;
  return h(
    "tr",
    { key: tenant.tenant },
    h("td", null, h("bdi", null, tenant.tenant)),
    cell("jobs", count(tenant.jobs)), cell("lines", count(tenant.lines)), cell("≈ tokens", short(tenant.tokens)),
    cell("oldest", duration(tenant.oldest_wait)), cell("p50", duration(tenant.p50)), cell("p95", duration(tenant.p95)),
    ["1h", "6h", "24h"].map((hours) => h("td", { class: "num", "data-label": `due ${hours}` }, pressure(due[hours]))),
  );
}

function pressure(value) {
  if (value === null || value === undefined) return h("span", { class: "faint" }, "–");
  return h("span", { class: value > 1 ? "pressure fail" : "pressure" }, h("svg", { class: "bar", preserveAspectRatio: "none", "aria-hidden": "true" }, h("rect", { class: value > 1 ? "over" : "d", width: `${Math.min(100, value * 100)}%`, height: "100%" })), value >= 10 ? ">10" : value.toFixed(1));
}
