// What every page shares: who looks, the five answers, whether the page is live, and the wishes of this browser.

const STORED = "pagemill";
export const VERSION = document.querySelector('meta[name="pagemill-version"]')?.content;

export const state = {
  me: null, // {tenant, role, key_name, key_hint} of the session
  overview: null, // the five answers
  live: "starting", // starting, live, cut, off
  cutSince: 0, // milliseconds; since when nothing arrives
  retryAt: 0,
  version: null, // of the page's files, as the service has them now
  toasts: [],
  models: [],
};

export const wishes = { theme: "system", density: "normal", shortcuts: true, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "{}");
  } catch {
    return {};
  }
}

export function wish(name, value) {
  wishes[name] = value;
  try {
    localStorage.setItem(STORED, JSON.stringify(wishes));
  } catch {
    // A browser that stores nothing still shows everything.
  }
  const { dataset } = document.documentElement;
  if (wishes.theme === "system") delete dataset.theme;
  else dataset.theme = wishes.theme;
  if (wishes.density === "compact") dataset.density = "compact";
  else delete dataset.density;
  changed();
}

let draw = () => {};
let isDue = false;

/** Tell how the page is drawn. */
export function onChange(listener) {
  draw = listener;
}

/** Draw once before the next frame, however often this is called until then. */
export function changed() {
  if (isDue) return;
  isDue = true;
  const now = () => {
    if (!isDue) return;
    isDue = false;
    draw();
  };
  // A hidden tab has no frames, and still needs its title.
  if (document.hidden) setTimeout(now, 200);
  else requestAnimationFrame(now);
}

export const canWrite = () => state.me?.role !== "read-only";
export const isOperator = () => state.me?.role === "operator";

let toasts = 0;

/** A message at the bottom, with an undo where one is given; it leaves after ten seconds, unless it `stays`. */
export function toast(text, { undo = null, undoText = "Undo", bad = false, stays = false } = {}) {
  const entry = { id: ++toasts, text, undo, undoText, bad };
  state.toasts = [...state.toasts.slice(-2), entry];
  changed();
  if (!stays) setTimeout(() => dismiss(entry), 10000);
  if (!bad) announce(text);
  return entry;
}

export function dismiss(entry) {
  state.toasts = state.toasts.filter((other) => other !== entry);
  changed();
}

/** Undo the newest action that can be undone. */
export function undoLast() {
  const entry = state.toasts.findLast((candidate) => candidate.undo);
  if (!entry) return;
  dismiss(entry);
  entry.undo();
}

let lastSaid = 0;
let waiting = null;

/** Say it to screen readers, politely and at most once in ten seconds; of several only the last is said. */
export function announce(text) {
  clearTimeout(waiting);
  const pause = Math.max(0, lastSaid + 10000 - Date.now());
  waiting = setTimeout(() => {
    lastSaid = Date.now();
    const polite = document.getElementById("polite");
    if (polite) polite.textContent = text;
  }, pause);
}
