// Keys: who may do what. A new one is shown once, in a dialog that closes only when it was copied.
import { get, post, remove } from "../api.js";
import { time } from "../format.js";
import { ask, copy, greyRows, problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { canWrite, changed, isOperator, state, toast } from "../store.js";

const ROLES = [["read-write", "sends, cancels and reads its tenant's jobs"], ["read-only", "sees its tenant's jobs and changes nothing"], ["operator", "sees all tenants, and runs the workers"]];

export function open() {
  const page = { keys: null, problem: null };

  async function refresh() {
    page.keys = (await get("/v1/keys")).data;
    page.problem = null;
    changed();
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });

  async function create() {
    const wanted = { name: "", role: "read-write", tenant: state.me.tenant };
    const field = (label, control) => h("label", { class: "field" }, h("span", null, label), control);
    const given = await ask({
      title: "New key",
      accept: "Make the key",
      body: [
        field("Name, for people", h("input", { class: "input", maxlength: 128, autofocus: true, oninput: (event) => (wanted.name = event.target.value) })),
        field("Role", h("select", { class: "input", onchange: (event) => (wanted.role = event.target.value) }, ROLES.filter(([role]) => isOperator() || role !== "operator").map(([role, note]) => h("option", { key: role, value: role }, `${role}: ${note}`)))),
        isOperator() && field("Tenant; a new name makes a new tenant", h("input", { class: "input", value: wanted.tenant, maxlength: 128, oninput: (event) => (wanted.tenant = event.target.value) })),
      ],
      values: () => wanted,
    });
    if (!given) return;
    try {
      const made = await post("/v1/keys", given);
      await ask({
        title: "This key is shown only now",
        accept: "I have copied it",
        locked: true,
        body: [h("p", { class: "muted" }, "The service keeps no more than a hash of it."), h("div", { class: "cmd" }, h("pre", { tabindex: 0, "aria-label": "The new key" }, made.key), h("button", { class: "btn sm", type: "button", onclick: () => copy(made.key, "the key") }, "Copy"))],
      });
      await refresh();
    } catch (failure) {
      toast(failure.message, { bad: true });
    }
  }

  async function revoke(key) {
    const isOwn = state.me.key_id === key.id;
    const sure = await ask({ title: `Revoke ${key.name || key.hint}?`, body: h("p", null, isOwn ? "This page is logged in with it: you are logged out at once, and so is every program that uses it." : "Programs that use it are refused at once. This cannot be taken back."), accept: "Revoke", danger: true });
    if (!sure) return;
    try {
      await remove(`/v1/keys/${key.id}`);
      toast(`Revoked ${key.name || key.hint}`);
      if (isOwn) location.assign("/login");
      else await refresh();
    } catch (failure) {
      toast(failure.message, { bad: true });
    }
  }

  return {
    title: () => "Keys",
    load,
    refresh,
    view: (now) => [
      h("div", { class: "head" }, h("h1", null, "Keys"), h("div", { class: "acts" }, canWrite() ? h("button", { class: "btn main", type: "button", onclick: create }, "New key") : h("span", { class: "badge idle" }, "read-only key"))),
      page.problem && h("div", { class: "panel" }, problem(page.problem, load)),
      !canWrite() && page.keys && h("p", { class: "hint" }, "This key changes nothing. Keys that can make others: ", page.keys.filter((key) => key.role !== "read-only" && !key.revoked_at).map((key) => key.name || key.hint).join(", ") || "none of this tenant"),
      h(
        "section",
        { class: "panel", "aria-label": "Keys" },
        h(
          "table",
          { class: "stack" },
          h("caption", { class: "sr" }, "Keys"),
          h("thead", null, h("tr", null, h("th", null, "Name"), h("th", null, "Key"), isOperator() && h("th", null, "Tenant"), h("th", null, "Role"), h("th", null, "Used"), h("th", null, "Ends"), h("th", null, h("span", { class: "sr" }, "Action")))),
          h("tbody", null, page.keys ? page.keys.map((key) => row(key, now, revoke)) : greyRows(3, 6)),
        ),
      ),
    ],
  };
}

function row(key, now, revoke) {
  const used = key.last_used_at === null ? "never" : now - key.last_used_at < 90 ? "within a minute" : time(key.last_used_at);
  return h(
    "tr",
    { key: key.id, class: key.revoked_at ? "lost" : "" },
    h("td", null, h("bdi", null, key.name || "–"), state.me.key_id === key.id && h("span", { class: "muted small" }, " · this one")),
    h("td", null, h("code", null, `${key.hint}…`)),
    isOperator() && h("td", { "data-label": "tenant" }, key.tenant),
    h("td", { class: "muted small" }, key.role),
    h("td", { class: "muted small", "data-label": "used" }, used),
    h("td", { class: "muted small" }, key.revoked_at ? `revoked ${time(key.revoked_at)}` : key.expires_at ? time(key.expires_at) : "never"),
    h("td", { class: "num" }, canWrite() && !key.revoked_at && h("button", { class: "btn sm danger", type: "button", "aria-label": `Revoke ${key.name || key.hint}`, onclick: () => revoke(key) }, "Revoke…")),
  );
}
