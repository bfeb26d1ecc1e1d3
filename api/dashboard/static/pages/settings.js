// Wishes of this browser, what the service is, and who changed what.
import { address, get, raw, remove } from "../api.js";
import { shortId, time } from "../format.js";
import { help } from "../keys.js";
import { greyRows } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { changed, isOperator, state, toast, VERSION, wish, wishes } from "../store.js";


const AUDIT_ROWS = 20;
const PAGES = { job: "/jobs/", worker: "/fleet/" };

/** Who changed what, newest first, with `Older` for those before. */
function auditPanel(page, older) {
  const { audit } = page;
  return h(
    "section",
    { class: "panel", "aria-label": "Audit log" },
    h("header", null, h("h2", null, "Audit log"), h("span", { class: "muted small" }, "who changed what")),
    audit && !audit.data.length
      ? h("p", { class: "body muted small" }, "Nothing was changed yet.")
      : h(
          "table",
          { class: "stack" },
          h("caption", { class: "sr" }, "Audit log"),
          h("thead", null, h("tr", null, h("th", null, "When"), h("th", null, "What"), h("th", null, "Of"), isOperator() && h("th", null, "Tenant"), h("th", null, "By"))),
          h("tbody", null, audit ? audit.data.map(auditRow) : greyRows(3, 4)),
        ),
    audit?.has_more && h("p", { class: "body btns" }, h("button", { class: "btn sm", type: "button", onclick: older }, "Older")),
  );
}

function auditRow(entry) {
  const { bulk, ...detail } = entry.detail;
  const page = PAGES[entry.action.split(".")[0]];
  const shown = Object.entries(detail).map(([name, value]) => `${name} ${value}`).join(", ");
  const by = entry.key ? entry.key.name || `${entry.key.hint}…` : { command_line: "the command line", operator: "an operator", stranger: "a stranger" }[entry.by] ?? "a key";
  return h(
    "tr",
    { key: entry.id },
    h("td", { class: "muted small" }, time(entry.at, { seconds: true })),
    h("td", null, entry.action.replace(".", " ").replace("_", " "), bulk && h("span", { class: "muted small" }, " · one of many"), shown && h("span", { class: "muted small text" }, " ", h("bdi", null, shown))),
    h("td", { class: "text", title: entry.target }, page && entry.action !== "job.deleted" ? h("a", { class: "link", href: page + entry.target }, shortId(entry.target)) : h("bdi", null, shortId(entry.target))),
    isOperator() && h("td", { class: "muted small text", "data-label": "tenant" }, entry.tenant ?? "–"),
    h("td", { class: "muted small text", title: entry.key?.id }, h("bdi", null, by)),
  );
}

export function open() {
  const page = { ready: null, api: null, audit: null };

  async function refresh() {
    page.ready = await get("/readyz").catch((failure) => ({ status: failure.message }));
    // The newest alone: what `Older` brought stays until the page is left.
    if ((page.audit?.data.length ?? 0) <= AUDIT_ROWS) page.audit = await get(address("/v1/audit", { limit: AUDIT_ROWS })).catch(() => page.audit);
    page.api ??= await raw("/openapi.json").then((answer) => answer.json()).then((document) => document.info).catch(() => null);
    changed();
  }

  async function older() {
    try {
      const next = await get(address("/v1/audit", { limit: AUDIT_ROWS, after: page.audit.last_id }));
      page.audit = { ...next, data: [...page.audit.data, ...next.data] };
      changed();
    } catch (failure) {
      toast(failure.message, { bad: true });
    }
  }

  const choose = (name, options) =>
    h("div", { class: "btns", role: "group", "aria-label": name }, options.map(([value, text]) => h("button", { key: text, class: "btn sm ghost", type: "button", "aria-pressed": String(wishes[name] === value), onclick: () => wish(name, value) }, text)));

  return {
    title: () => "Settings",
    load: refresh,
    refresh,
    view: () => [
      h("div", { class: "head" }, h("h1", null, "Settings")),
      h(
        "div",
        { class: "pair" },
        h(
          "section",
          { class: "panel", "aria-label": "This browser" },
          h("header", null, h("h2", null, "This browser")),
          h(
            "div",
            { class: "body steps" },
            h("p", null, "Theme"), choose("theme", [["system", "As the system"], ["light", "Light"], ["dark", "Dark"]]),
            h("p", null, "Rows"), choose("density", [["normal", "Normal"], ["compact", "Compact"]]),
            h("p", null, "Single-key shortcuts"), choose("shortcuts", [[true, "On"], [false, "Off"]]),
            h("p", { class: "btns" }, h("button", { class: "btn sm", type: "button", onclick: help }, "All shortcuts"), h("a", { class: "btn sm", href: "/?wall=1" }, "Wall view")),
            h("p", { class: "muted small" }, `Times stand in ${Intl.DateTimeFormat().resolvedOptions().timeZone}.`),
          ),
        ),
        h(
          "section",
          { class: "panel", "aria-label": "The service" },
          h("header", null, h("h2", null, "The service")),
          h(
            "div",
            { class: "body steps" },
            h(
              "dl",
              { class: "facts" },
              h("dt", null, "State"), h("dd", null, page.ready?.status ?? "–"),
              h("dt", null, "Version"), h("dd", null, page.api?.version ?? "–"),
              h("dt", null, "Page"), h("dd", null, h("code", null, VERSION)),
              h("dt", null, "Tenant"), h("dd", null, state.me?.tenant),
              h("dt", null, "Key"), h("dd", null, h("code", null, `${state.me?.key_hint}…`), ` ${state.me?.role}`),
            ),
            h("p", { class: "btns" }, h("a", { class: "btn sm", href: "/docs" }, "API reference"), h("button", { class: "btn sm", type: "button", onclick: async () => { await remove("/session").catch(() => null); location.assign("/login"); } }, "Sign out")),
          ),
        ),
      ),
      auditPanel(page, older),
    ],
  };
}
