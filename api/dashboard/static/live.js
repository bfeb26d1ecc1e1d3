// Keeps what is shown current: by a stream of events, or by reading the page anew where there is none. A hidden tab asks
// for nothing.
import { address } from "./api.js";
import { changed, state } from "./store.js";

const POLL = 5000; // milliseconds
const HIDDEN = 10000; // milliseconds after which a hidden tab stops
const SILENCE = 8000; // milliseconds without an event; the service speaks every three seconds
const BARRED = 30000; // milliseconds until a stream is tried again that was refused
const LONGEST_PAUSE = 30000;
const EVENTS = ["hello", "beat", "reset", "overview", "queue", "workers", "job", "gone", "jobs.new", "minute", "failures", "timeline", "deliveries"];

// {refresh, stream, on, isLive}: `refresh` reads what the page shows and rejects where the service does not answer,
// `stream` says what to listen to, `on` takes an event. One that `isLive` needs no reading while it has its stream.
let subject = null;
let source = null;
let listened = null; // what the stream was opened for
let heard = 0;
let barredUntil = 0;
let due = Infinity; // when the page is read next
let failures = 0;
let isResting = false;
let hidden = null;

/** Keep a page current until another one takes its place. */
export function watch(page) {
  subject = page;
  if (state.live === "off") return;
  if (state.live === "starting") state.live = "live";
  if (!document.hidden) begin();
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
  source?.close();
  source = listened = null;
  due = Infinity;
}

export function start() {
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) {
      hidden = setTimeout(() => {
        stop();
        isResting = true;
      }, HIDDEN);
    } else {
      isResting = false;
      if (state.live !== "off" && subject && !source && due === Infinity) again();
    }
  });
  // A browser knows at once that the network went or came back.
  addEventListener("offline", () => state.live !== "off" && lost());
  addEventListener("online", () => state.live === "cut" && again());
  setInterval(look, 1000);
}

function begin() {
  if (Date.now() >= barredUntil) connect();
  due = source && subject.isLive ? Infinity : Date.now() + POLL;
}

function look() {
  if (!subject || isResting || state.live === "off") return;
  const now = Date.now();
  if (source && now - heard > SILENCE) lost();
  else if (source && !covers(listened, subject.stream())) connect();
  if (now >= due) again();
}

/** Whether a stream that was opened for `has` brings all of `wants`. */
function covers(has, wants) {
  const { jobs, ...rest } = wants;
  return Object.keys(rest).every((name) => rest[name] === has[name]) && (jobs ?? []).every((id) => has.jobs?.includes(id));
}

function connect() {
  source?.close();
  listened = subject.stream();
  heard = Date.now();
  const mine = (source = new EventSource(address("/v1/events", { ...listened, jobs: listened.jobs?.join(",") })));
  for (const name of EVENTS) {
    mine.addEventListener(name, (event) => {
      if (mine !== source) return;
      heard = Date.now();
      if (name === "hello") return void found(JSON.parse(event.data));
      if (name === "reset") return void again();
      if (name === "beat") return;
      subject.on(name, JSON.parse(event.data));
      changed();
    });
  }
  mine.addEventListener("error", () => {
    if (mine !== source) return;
    // The browser tries again by itself, unless it was refused.
    if (mine.readyState === EventSource.CLOSED) {
      barredUntil = Date.now() + BARRED;
      stop();
      due = 0;
    } else {
      cut(3000);
    }
  });
}

/** Read the page anew, then go on listening. */
async function again() {
  due = Infinity;
  const mine = subject;
  try {
    await mine?.refresh();
    if (mine === subject) found({});
  } catch (failure) {
    if (mine !== subject) return;
    if (failure.status === 401) return void location.reload();
    if (failure.status && failure.status < 500) found({});
    else lost();
  }
}

function found({ version }) {
  if (state.live === "cut") document.getElementById("polite").textContent = "Live again";
  if (version) state.version = version;
  failures = 0;
  if (state.live === "off") return;
  state.live = "live";
  if (!document.hidden && !source) begin();
  else if (!(source && subject.isLive)) due = Date.now() + POLL;
  changed();
}

function cut(pause) {
  if (state.live !== "cut") state.cutSince = Date.now();
  state.live = "cut";
  state.retryAt = Date.now() + pause;
  changed();
}

function lost() {
  stop();
  const pause = Math.min(LONGEST_PAUSE, 2000 * 2 ** failures++);
  due = Date.now() + pause;
  cut(pause);
}
