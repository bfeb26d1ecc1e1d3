// Starts the page: who is it, which address, what is shown, and the rail around it.
import { ApiError, get } from "./api.js";
import { duration, time } from "./format.js";
import { icon, logo } from "./icons.js";
import * as keyboard from "./keys.js";
import * as live from "./live.js";
import * as access from "./pages/access.js";
import * as fleet from "./pages/fleet.js";
import * as job from "./pages/job.js";
import * as jobs from "./pages/jobs.js";
import * as line from "./pages/line.js";
import * as login from "./pages/login.js";
import * as create from "./pages/new.js";
import * as queue from "./pages/queue.js";
import * as settings from "./pages/settings.js";
import * as webhooks from "./pages/webhooks.js";
import * as worker from "./pages/worker.js";
import { toasts } from "./parts/dialog.js";
import { h, render } from "./parts/render.js";
import { follow, go, match, query } from "./router.js";
import { changed, onChange, state, VERSION } from "./store.js";

const PAGES = { jobs, job, line, login, queue, fleet, worker, new: create, keys: access, webhooks, settings };
const NAV = [
  ["/", "jobs", "Jobs", "jobs"],
  ["/queue", "queue", "Queue", "queue"],
  ["/fleet", "fleet", "Fleet", "fleet"],
  ["/new", "new", "New job", "plus"],
  null,
  ["/keys", "keys", "Keys", "key"],
  ["/webhooks", "webhooks", "Webhooks", "hook"],
  ["/settings", "settings", "Settings", "gear"],
];
const IN_RAIL = { job: "jobs", line: "jobs", worker: "fleet" };
const root = document.getElementById("app");

let name = "";
let page = null;
let hiddenAt = null;

const isWall = () => query("wall") === "1";

async function arrive() {
  const found = match(location.pathname);
  if (found.name !== "login" && !state.me) {
    try {
      state.me = await get("/session");
    } catch (failure) {
      if (!(failure instanceof ApiError) || failure.status !== 401) {
        page = { title: () => "Pagemill", view: () => h("p", { class: "problem fail" }, failure.message, " It is tried again.") };
        setTimeout(arrive, 3000);
        return changed();
      }
      sessionStorage.setItem("next", location.pathname + location.search);
      history.replaceState(null, "", "/login");
      return arrive();
    }
  }
  if (isWall()) document.documentElement.dataset.wall = "1";
  else delete document.documentElement.dataset.wall;
  const isSame = page && found.name === name && JSON.stringify(found.params) === JSON.stringify(page.params);
  if (isSame && page.arrive) page.arrive();
  else {
    page?.close?.();
    live.stop();
    name = found.name;
    page = (PAGES[name] ?? missing).open(found.params, enter);
    page.params = found.params;
    if (root.querySelector("main")) setTimeout(() => root.querySelector("main")?.focus(), 0);
  }
  changed();
  const mine = page;
  if (!page.bare) refreshOverview().catch(() => null);
  await page.load?.();
  if (mine === page && !page.bare) {
    live.watch({
      refresh: () => Promise.all([refreshOverview(), mine.refresh?.()]),
      stream: () => ({ topics: ["overview", ...(mine.topics ?? [])].join(), ...mine.stream?.() }),
      on: (event, data) => (event === "overview" ? (state.overview = data) : mine.on?.(event, data)),
      isLive: Boolean(mine.on),
    });
  }
  changed();
}

const missing = {
  open: () => ({ title: () => "Nothing here", view: () => h("div", { class: "panel empty" }, h("h1", null, "There is nothing at this address"), h("p", null, h("a", { class: "link", href: "/" }, "All jobs"))) }),
};

function enter() {
  const next = sessionStorage.getItem("next") ?? "/";
  sessionStorage.removeItem("next");
  history.replaceState(null, "", next.startsWith("/login") ? "/" : next);
  arrive();
}

/** The five answers of a page that opens, or that is not live by events. */
async function refreshOverview() {
  state.overview = await get("/v1/overview");
  changed();
}

function draw() {
  if (!page) return;
  // Nobody presses a button on a wall.
  if (isWall() && state.version && state.version !== VERSION) return void location.reload();
  const now = Date.now() / 1000;
  const title = page.title?.(now);
  document.title = hiddenAt ? `${title} at ${time(hiddenAt)}` : `${title} · Pagemill`;
  render(page.bare ? [page.view(now), toasts()] : frame(now), root);
}

function frame(now) {
  const current = IN_RAIL[name] ?? name;
  return h(
    "div",
    { class: state.live === "cut" ? "frame stale" : "frame" },
    h("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); root.querySelector("main").focus(); } }, "Skip to the content"),
    h(
      "nav",
      { class: "rail", "aria-label": "Pages" },
      h("a", { class: "brand", href: "/" }, logo(), "Pagemill"),
      NAV.map((entry, place) => (entry ? navLink(entry, current) : h("div", { key: `sep-${place}`, class: "sep" }))),
      foot(now),
    ),
    h(
      "main",
      { id: "main", tabindex: -1 },
      h("div", { class: "phonebar" }, logo(), "Pagemill", liveState(now)),
      h("div", { key: page.key ?? name }, page.view(now)),
    ),
    tabbar(current),
    toasts(),
  );
}

function navLink([href, key, text, picture], current) {
  const o = state.overview;
  const counts = { jobs: o?.jobs.open, queue: o?.jobs.waiting, fleet: o?.workers.live };
  return h("a", { key: href, class: "nav", href, "aria-current": key === current ? "page" : null, title: text }, icon(picture), text, h("span", { class: "count" }, counts[key] || ""));
}

function foot(now) {
  const { me } = state;
  const role = { operator: "operator key · all tenants", "read-only": `read-only key · ${me?.tenant}`, "read-write": `key of ${me?.tenant}` }[me?.role] ?? "";
  return h(
    "div",
    { class: "foot" },
    state.version && state.version !== VERSION && h("button", { class: "btn sm", type: "button", title: "The service was updated", onclick: () => location.reload() }, "Reload"),
    liveState(now),
    h("a", { href: "/keys", class: "word" }, role),
    h("button", { type: "button", onclick: keyboard.help, "aria-label": "Keyboard shortcuts" }, h("kbd", null, "?"), h("span", { class: "word" }, " keyboard")),
  );
}

function liveState(now) {
  const wait = Math.max(0, Math.ceil(state.retryAt / 1000 - now));
  const [kind, text, note] = {
    live: ["", "Live", "Changes as it happens. Click to stop."],
    cut: ["cut", `Not live since ${time(state.cutSince / 1000, { seconds: true })}`, `Tries again in ${wait} s`],
    off: ["off", "Live is off", "Click for live updates."],
  }[state.live] ?? ["off", "Connecting", ""];
  return h(
    "button",
    { class: `live ${kind}`, type: "button", title: note, onclick: live.toggle },
    h("i", null),
    h("span", { class: "word" }, text, kind === "cut" && wait ? `, tries again in ${duration(wait)}` : ""),
  );
}

function tabbar(current) {
  const more = ["keys", "webhooks", "settings"];
  return h(
    "nav",
    { class: "tabbar", "aria-label": "Pages, phone" },
    NAV.slice(0, 4).map(([href, key, text, picture]) => h("a", { key: href, href, "aria-current": key === current ? "page" : null }, icon(picture), text === "New job" ? "New" : text)),
    h("button", { type: "button", "aria-current": more.includes(current) ? "page" : null, onclick: () => moreSheet() }, icon("more"), "More"),
  );
}

function moreSheet() {
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", "More pages");
  document.body.append(dialog);
  const leave = (href) => () => { dialog.close(); go(href); };
  render(
    h(
      "div",
      null,
      NAV.slice(5).map(([href, , text, picture]) => h("button", { key: href, class: "btn", type: "button", onclick: leave(href) }, icon(picture), text)),
      h("button", { class: "btn ghost", type: "button", onclick: () => dialog.close() }, "Close"),
    ),
    dialog,
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
}

let lock = null;

async function keepAwake() {
  if (!isWall() || document.hidden || !navigator.wakeLock) return;
  lock = await navigator.wakeLock.request("screen").catch(() => null);
}

document.addEventListener("visibilitychange", () => {
  hiddenAt = document.hidden ? Date.now() / 1000 : null;
  if (!document.hidden && !lock?.released) keepAwake();
  changed();
});
setInterval(() => document.hidden || changed(), 1000);
onChange(draw);
follow(arrive);
live.start();
keyboard.install({
  page: () => page,
  go,
  wall: () => {
    go(isWall() ? "/" : "/?wall=1&q=status:open");
    keepAwake();
  },
});
arrive();

