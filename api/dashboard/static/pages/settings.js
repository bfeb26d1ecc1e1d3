// Wishes of this browser, and what the service is.
import { get, raw, remove } from "../api.js";
import { help } from "../keys.js";
import { h } from "../parts/render.js";
import { changed, state, VERSION, wish, wishes } from "../store.js";


export function open() {
  const page = { ready: null, api: null };

  async function refresh() {
    page.ready = await get("/readyz").catch((failure) => ({ status: failure.message }));
    page.api ??= await raw("/openapi.json").then((answer) => answer.json()).then((document) => document.info).catch(() => null);
    changed();
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
    ],
  };
}
