// One stream of server-sent events a visible tab. It is read with `fetch` and not with EventSource, because only so are
// the server's comments seen (silence means something) and a position is sent as `Last-Event-ID`.
import { address } from "./api.js";
import { changed, state } from "./store.js";

const SILENCE = 8000; // milliseconds without an event or comment
const HIDDEN = 10000; // milliseconds that a hidden tab keeps its stream
const POLL = 5000;
const LONGEST_PAUSE = 30000;
const VERSION = document.querySelector('meta[name="pagemill-version"]')?.content;

let wanted = null; // {topics, jobs, job, onEvent, refresh}
let controller = null;
let lastId = "";
let failures = 0;
let retry = null;
let poll = null;
let silence = null;
let hidden = null;

/** Follow what a page shows. Its `onEvent(name, data)` gets changes, `refresh()` is called where they were missed. */
export function watch(subject) {
  const isSame = wanted && JSON.stringify(query(wanted)) === JSON.stringify(query(subject));
  wanted = subject;
  if (isSame && (controller || poll)) return;
  lastId = "";
  if (state.live !== "off" && !document.hidden) reopen();
}

export function toggle() {
  if (state.live === "off") {
    state.live = "starting";
    wanted?.refresh();
    reopen();
  } else {
    close();
    state.live = "off";
  }
  changed();
}

/** Close the stream: the session ends, or another page opens. */
export function close() {
  controller?.abort();
  controller = null;
  for (const timer of [retry, poll, silence]) clearTimeout(timer);
  retry = poll = silence = null;
}

export function start() {
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(close, HIDDEN);
    else if (state.live !== "off" && wanted && !controller) {
      wanted.refresh();
      reopen();
    }
  });
}

function query(subject) {
  return { topics: subject.topics.join(","), jobs: subject.jobs?.join(","), job: subject.job, q: subject.q };
}

function reopen() {
  close();
  if (!wanted) return;
  controller = new AbortController();
  read(controller).catch((failure) => lost(failure));
}

async function read(mine) {
  heard(mine);
  const response = await fetch(address("/v1/events", query(wanted)), {
    credentials: "same-origin", cache: "no-store", signal: mine.signal,
    headers: { accept: "text/event-stream", ...(lastId ? { "last-event-id": lastId } : {}) },
  });
  if (response.status !== 200) {
    // 204: this session has enough streams. 404: a service without them.
    await response.body?.cancel();
    if (response.status === 401) return location.reload();
    return response.status >= 500 ? lost() : startPolling();
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (mine !== controller) return undefined;
    if (done) break;
    heard(mine);
    if (state.live !== "live") back("live");
    const blocks = (rest + value.replaceAll("\r\n", "\n")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) take(block);
  }
  return lost();
}

function take(block) {
  let name = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
    else if (line.startsWith("id:")) lastId = line.slice(3).trim();
  }
  if (!data && name === "message") return; // a comment
  const content = data ? JSON.parse(data) : null;
  if (name === "hello") {
    if (content?.version && VERSION && content.version !== VERSION) {
      state.updated = true;
      if (document.documentElement.dataset.wall) location.reload();
    }
  } else if (name === "reset") wanted.refresh();
  else if (name === "overview") state.overview = content;
  else if (name === "bye") failures = 0;
  else wanted.onEvent?.(name, content);
  changed();
}

function heard(mine) {
  clearTimeout(silence);
  silence = setTimeout(() => {
    if (mine === controller) {
      mine.abort();
      lost();
    }
  }, SILENCE);
}

function lost(failure) {
  if (failure?.name === "AbortError" && state.live === "off") return;
  if (document.hidden && !controller) return;
  close();
  if (state.live !== "cut") state.cutSince = Date.now();
  state.live = "cut";
  const pause = Math.min(LONGEST_PAUSE, 1000 * 2 ** failures++) * (0.8 + 0.4 * Math.random());
  state.retryAt = Date.now() + pause;
  retry = setTimeout(() => {
    // A fetch tells whether the service is back; only then is what was missed read.
    wanted?.refresh().then(() => reopen(), () => reopen());
  }, pause);
  changed();
}

function back(to) {
  if (state.live === "cut") {
    wanted?.refresh();
    document.getElementById("polite").textContent = "Live again";
  }
  failures = 0;
  state.live = to;
  changed();
}

function startPolling() {
  close();
  back("polling");
  poll = setTimeout(async function again() {
    try {
      await wanted?.refresh();
      if (state.live === "cut") back("polling");
    } catch {
      if (state.live !== "cut") state.cutSince = Date.now();
      state.live = "cut";
      state.retryAt = Date.now() + POLL;
      changed();
    }
    if (poll) poll = setTimeout(again, POLL);
  }, POLL);
}
