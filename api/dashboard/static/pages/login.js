// Login by key, or by the link that `pagemill up` prints; the code behind "#" reaches the service once and no log.
import { get, post } from "../api.js";
import { logo } from "../icons.js";
import { h } from "../parts/render.js";
import { changed, state } from "../store.js";

export function open(params, enter) {
  const page = { key: "", problem: null, isBusy: false };

  async function login(credentials) {
    page.isBusy = true;
    page.problem = null;
    changed();
    try {
      state.me = await post("/session", credentials);
      page.key = "";
      enter();
    } catch (failure) {
      page.problem = failure.status === 401 ? (credentials.code ? "This link was used, or is older than ten minutes. A key works always." : "This is no key of this service, or it was revoked.") : failure.message;
    }
    page.isBusy = false;
    changed();
  }

  return {
    title: () => "Log in",
    bare: true,
    async load() {
      const code = location.hash.slice(1);
      if (code) {
        history.replaceState(null, "", "/login");
        await login({ code });
      } else {
        const me = await get("/session").catch(() => null);
        if (me) {
          state.me = me;
          enter();
        }
      }
    },
    view: () =>
      h(
        "main",
        { class: "login" },
        h(
          "form",
          { onsubmit: (event) => { event.preventDefault(); if (page.key) login({ key: page.key.trim() }); } },
          h("h1", { class: "brand" }, logo(), "Pagemill"),
          h(
            "div",
            { class: "field" },
            h("label", { for: "key" }, "API key"),
            h("input", {
              class: "input mono", id: "key", type: "password", autocomplete: "current-password", autofocus: true, placeholder: "pm_…", value: page.key,
              "aria-invalid": page.problem ? "true" : null, "aria-describedby": "login-problem", oninput: (event) => { page.key = event.target.value; changed(); },
            }),
          ),
          h("p", { id: "login-problem", class: "fail small", role: "alert" }, page.problem),
          h("button", { class: "btn main", type: "submit", disabled: page.isBusy }, page.isBusy ? "Logging in …" : "Log in"),
          h("p", { class: "small muted" }, "The key is kept by no script: the service gives the browser a cookie that only it can read. ", h("code", null, "pagemill up"), " prints a link that logs in once."),
        ),
      ),
  };
}
