// Keeps what is shown current: a visible page is read anew every few seconds, a hidden one asks for nothing.
import { changed, state } from "./store.js";

const POLL = 5000; // milliseconds
const HIDDEN = 10000; // milliseconds after which a hidden tab stops
const LONGEST_PAUSE = 30000;

let subject = null; // {refresh}: reads what the page shows; rejects where the service does not answer
let failures = 0;
let timer = null;
let hidden = null;

/** Keep a page current until another one takes its place. */
export function watch(page) {
  subject = page;
  if (state.live === "off") return;
  if (state.live === "starting") state.live = "live";
  if (!document.hidden) next(POLL);
}

export function toggle() {
  if (state.live === "off") {
    state.live = "live";
    again();
  } else {
    stop();
    state.live = "off";
  }
  changed();
}

/** Ask for nothing more: another page opens. */
export function stop() {
  clearTimeout(timer);
  timer = null;
}

export function start() {
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(stop, HIDDEN);
    else if (state.live !== "off" && subject && timer === null) again();
  });
  // A browser knows at once that the network went or came back.
  addEventListener("offline", () => state.live !== "off" && lost());
  addEventListener("online", () => state.live === "cut" && again());
}

function next(pause) {
  stop();
  timer = setTimeout(again, pause);
}

async function again() {
  stop();
  const mine = subject;
  try {
    await mine?.refresh();
    if (mine !== subject) return;
    found();
  } catch (failure) {
    if (mine !== subject) return;
    if (failure.status === 401) return void location.reload();
    if (failure.status && failure.status < 500) found();
    else lost();
  }
}

function found() {
  if (state.live === "cut") document.getElementById("polite").textContent = "Live again";
  failures = 0;
  if (state.live === "off") return;
  state.live = "live";
  if (!document.hidden || timer) next(POLL);
  changed();
}

function lost() {
  if (state.live !== "cut") state.cutSince = Date.now();
  state.live = "cut";
  const pause = Math.min(LONGEST_PAUSE, 2000 * 2 ** failures++);
  state.retryAt = Date.now() + pause;
  next(pause);
  changed();
}
