// Single-key shortcuts. Each has a button; they are off in fields, with a modifier, and by a switch in Settings.
import * as live from "./live.js";
import { ask } from "./parts/dialog.js";
import { h } from "./parts/render.js";
import { undoLast, wish, wishes } from "./store.js";

const PLACES = { j: "/", q: "/queue", f: "/fleet", k: "/keys", w: "/webhooks", s: "/settings" };
const HELP = [
  ["/", "search"], ["j k", "move"], ["Enter", "open"], ["x", "select; Shift+x a range, * the page"], ["o", "open a result in place"],
  ["[ ]", "previous, next line"], ["p", "pause or resume"], ["r", "retry what failed"], ["c", "copy the id"], ["y", "copy as curl"], ["z", "undo"],
  ["n", "new job"], ["g then j q f k w s", "Jobs, Queue, Fleet, Keys, Webhooks, Settings"], ["t", "light or dark"], ["l", "live on or off"],
  ["w", "wall view, for a second screen"], ["Esc", "back"], ["?", "this list"],
];

let app = null;
let isGoing = false;

export function install(given) {
  app = given;
  document.addEventListener("keydown", pressed);
}

export function help() {
  ask({
    title: "Keyboard",
    accept: "Close",
    body: h("dl", { class: "keys" }, HELP.flatMap(([key, text]) => [h("dt", null, key.split(" ").map((part) => (part === "then" ? " then " : [h("kbd", null, part), " "]))), h("dd", null, text)])),
  });
}

function pressed(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const inField = target.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]");
  if (inField || document.querySelector("dialog[open]")) return;
  const page = app.page();
  if (!page || page.bare) return;
  if (key === "Escape") return void (page.back ? app.go(page.back) : target.blur?.());
  if (!wishes.shortcuts) return;
  if (isGoing) {
    isGoing = false;
    if (PLACES[key]) take(event, () => app.go(PLACES[key]));
    return;
  }
  if (key === "Enter" && target.closest?.("a, button, summary, input")) return;
  const own = page.keys?.[key];
  if (own) return take(event, own);
  const everywhere = {
    g: () => {
      isGoing = true;
      setTimeout(() => (isGoing = false), 1200);
    },
    n: () => app.go("/new"),
    t: () => wish("theme", isDark() ? "light" : "dark"),
    l: live.toggle,
    w: app.wall,
    z: undoLast,
    "?": help,
    "/": () => app.go("/"),
  }[key];
  if (everywhere) take(event, everywhere);
}

function take(event, act) {
  event.preventDefault();
  act(event);
}

function isDark() {
  if (wishes.theme === "system") return matchMedia("(prefers-color-scheme: dark)").matches;
  return wishes.theme === "dark";
}
