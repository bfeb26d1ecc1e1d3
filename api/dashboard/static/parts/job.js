// A job in words, shapes and bars: what its state is called, why it waits, when it ends.
import { brief, count, duration, percentNumber, plural, rate, short, tail, time } from "../format.js";
import { clockIcon, stateIcon } from "../icons.js";
import { h } from "./render.js";

export const isOpen = (job) => job.ended_at === null || job.ended_at === undefined;
export const settled = (job) => job.request_counts.total - job.request_counts.open;

/** Lines that ended without an answer. */
export const failedLines = (job) => job.request_counts.failed;
export const nameOf = (job) => job.name || job.metadata?.name || tail(job.id);
export const hasName = (job) => Boolean(job.name || job.metadata?.name);

/** {shape, word, tone}: the tone is a class of the style sheet. */
export function stateOf(job) {
  if (job.pending) return { shape: "paused", word: job.pending, tone: "idle" };
  switch (job.status) {
    case "completed":
      return failedLines(job)
        ? { shape: "failures", word: "Completed with failures", tone: "fail" }
        : { shape: "completed", word: "Completed", tone: "ok" };
    case "cancelled":
      return { shape: "cancelled", word: "Cancelled", tone: "idle" };
    case "cancelling":
      return { shape: "cancelling", word: "Cancelling", tone: "idle" };
    case "expired":
      return { shape: "expired", word: "Expired", tone: "gone" };
    case "failed":
      return { shape: "failures", word: "Refused", tone: "fail" };
    case "finalizing":
      return { shape: "running", word: "Finalizing", tone: "run" };
    case "validating":
      return { shape: "waiting", word: "Validating", tone: "wait" };
    default:
      if (job.paused_at) return { shape: "paused", word: "Paused", tone: "idle" };
      if (isWaiting(job)) return { shape: "waiting", word: "Waiting", tone: "wait" };
      return { shape: "running", word: "Running", tone: "run" };
  }
}

/** Settled lines a second, of late. */
export const rateOf = (job) => job.rate ?? job.lines_per_second;

/** An open job of which no line runs. */
export function isWaiting(job) {
  return job.status === "in_progress" && !job.paused_at && !job.running && Boolean(job.wait);
}

export function stateMark(job, classes = "") {
  const { shape, word, tone } = stateOf(job);
  const { total } = job.request_counts;
  return h(
    "span",
    { class: `${tone} ${classes}`, title: word },
    stateIcon(shape, total ? settled(job) / total : 0),
    h("span", { class: "sr" }, word),
  );
}

/** Parts of the bar as [class, share from 0 to 1]; what failed is seen even where it is one line in a million. */
export function segments(job) {
  const { total, completed, failed, cancelled, expired } = job.request_counts;
  if (!total) return [];
  return [
    ["d", completed / total],
    ["f", failed / total],
    ["r", (job.running ?? 0) / total],
    ["g", (cancelled + expired) / total],
  ];
}

/** The bar as SVG. A segment that is not empty is at least `least` of the width. */
export function bar(job, { thick = false, label = null } = {}) {
  const least = thick ? 0.0025 : 0.012;
  let x = 0;
  const rects = segments(job).map(([kind, part]) => {
    const width = part === 0 ? 0 : Math.max(part, kind === "f" ? least : 0);
    const rect = h("rect", { class: kind, x: `${Math.min(x, 1 - width) * 100}%`, width: `${width * 100}%`, height: "100%" });
    x += width;
    return rect;
  });
  // The failed part last, so that nothing covers it.
  [rects[1], rects[2]] = [rects[2], rects[1]];
  const tone = isOpen(job) ? (job.paused_at ? "stop" : "") : job.status === "completed" ? "done" : "stop";
  return h(
    "svg",
    {
      class: `${thick ? "mill" : "bar"} ${tone}`, preserveAspectRatio: "none",
      ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }),
    },
    rects,
  );
}

export function progress(job) {
  const { total } = job.request_counts;
  return h(
    "div",
    { class: "prog" },
    bar(job),
    h("span", { class: "pc" }, `${percentNumber(settled(job), total)} %`),
    h("span", { class: "muted small of" }, count(total)),
  );
}

/** Settled lines of the last minutes as a small curve. */
export function spark(values) {
  const points = (values ?? []).filter((value) => value !== null);
  if (points.length < 2) return null;
  const top = Math.max(...points, 1e-9);
  const at = (value, place) => `${((place * 64) / (points.length - 1)).toFixed(1)} ${(19 - (17 * value) / top).toFixed(1)}`;
  const curve = `M${points.map(at).join(" L")}`;
  return h(
    "svg",
    { class: "spark", viewBox: "0 0 64 20", preserveAspectRatio: "none", "aria-hidden": "true" },
    h("path", { class: "area", d: `${curve} L64 20 L0 20Z` }),
    h("path", { d: curve }),
  );
}

export function rateCell(job) {
  const value = rateOf(job);
  if (!isOpen(job) || job.paused_at || value === undefined || value === null) return null;
  const [figure, unit] = rate(value);
  return h("div", { class: "rate" }, spark(job.spark), h("span", null, figure, h("span", { class: "muted small" }, unit)));
}

/** The sentence that says why a job waits, or why more of it does not run; "" where neither is so. */
export function waitText(job) {
  return reasonText(job.wait ?? job.held_back);
}

/** A reason in words. Times stand in this browser's zone, where the service's text has UTC. */
export function reasonText(reason) {
  if (!reason) return "";
  const { code, args = {}, text } = reason;
  if (code === "no_worker" && args.last_seen) return `No live worker for ${args.model}, last seen ${time(args.last_seen)}`;
  // Short words first: a list cuts the rest off.
  if (code === "priority" || code === "older_jobs") return `${plural(args.jobs, code === "priority" ? "job" : "older job")}${code === "priority" ? " of higher priority" : ""} first; ${plural(args.lines, "line")}`;
  if (code === "paused" && args.paused_at && !args.expires_at) return `Paused since ${time(args.paused_at)}`;
  return text.replace(/\.$/, "");
}

export function why(text) {
  return h("span", { class: "why", title: text }, clockIcon(), h("span", null, text));
}

/** What stands under "Ends": an estimate, an end, or why there is none. */
export function endCell(job, now) {
  const { eta } = job;
  if (!isOpen(job)) return endText(job, now);
  if (job.paused_at) return h("span", { class: "muted" }, `Paused at ${time(job.paused_at)}`);
  if (job.status === "cancelling") return h("span", { class: "muted" }, `Cancelling, ${count(job.request_counts.open)} lines left`);
  if (eta?.at) {
    const late = job.expires_at && eta.at > job.expires_at ? eta.at - job.expires_at : 0;
    return [
      h("b", null, time(eta.at)), " ",
      late ? h("span", { class: "fail" }, `${brief(late)} late`) : h("span", { class: "muted" }, `in ${brief(eta.at - now)}`),
    ];
  }
  return h("span", { class: "muted" }, job.running || rateOf(job) ? "Too early to tell" : "");
}

function endText(job, now) {
  const took = duration(Math.max(0, job.ended_at - job.in_progress_at));
  if (job.status === "completed") return h("span", { class: "muted" }, `${time(job.ended_at)}, took ${took === "0 s" ? "under 1 s" : took}`);
  if (job.status === "expired") return h("span", { class: "muted" }, `Window of ${job.completion_window} closed ${time(job.ended_at)}`);
  if (job.status === "cancelled") return h("span", { class: "muted" }, `Cancelled ${time(job.ended_at)}`);
  return h("span", { class: "muted" }, time(job.ended_at, { now: now * 1000 }));
}

export const tokensOf = (job) => short(job.usage.total_tokens);
export const ageOf = (job, now) => brief(Math.max(0, now - job.created_at));

/** What a click on a job's name opens. */
export const hrefOf = (job) => `/jobs/${job.id}`;
