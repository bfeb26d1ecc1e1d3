// What happened to a job, newest first: events of the service and what the job's own times say.
import { count, duration, exact, fullTime, plural, shortId, time } from "../format.js";
import { isOpen, stateOf, waitText } from "./job.js";
import { h } from "./render.js";

const nameOf = (detail) => detail.worker_name ?? detail.name ?? detail.host ?? (detail.worker ? shortId(String(detail.worker)) : "a worker");
const by = (detail) => (detail.key ? `by key ${detail.key}${detail.tenant ? `, ${detail.tenant}` : ""}` : "");

// Each kind as [dot, text, note].
const ended = (d, job) => [job.status === "completed" && !job.request_counts.failed ? "ok" : "fail", stateOf(job).word, `${plural(job.request_counts.completed, "line")} answered`];
const KINDS = {
  created: () => ["", "Upload starts", ""],
  started: (d, job, at) => ["", "Published", `${plural(d.lines ?? job.request_counts.total, "line")}${at - job.created_at >= 1 ? `, stored in ${duration(at - job.created_at)}` : ""}`],
  cancelling: () => ["", "Cancellation asked for", ""],
  completed: ended, failed: ended, expired: ended, cancelled: ended,
  claimed: (d, job, at) => ["", `First claim, by ${nameOf(d)}`, at && job.in_progress_at ? `waited ${duration(Math.max(0, at - job.in_progress_at))}` : ""],
  worker_joined: (d) => ["", `${nameOf(d)} joins`, d.seconds ? `loaded the model in ${duration(d.seconds)}` : ""],
  worker_lost: (d) => ["fail", `${nameOf(d)} lost, its lease ran out`, d.lines ? `${plural(d.lines, "line")} free again; no answer lost` : "it held no line"],
  paused: (d) => ["", "Paused", by(d)],
  resumed: (d) => ["", "Resumed", by(d)],
  priority: (d) => ["", `Priority ${d.from ?? d.before ?? ""} → ${d.to ?? d.after ?? d.priority ?? ""}`, by(d)],
  renamed: (d) => ["", `Renamed ${d.to ?? d.name ?? ""}`, by(d)],
  retried: (d) => ["", `Retried ${d.lines ? plural(d.lines, "line") : ""}`, d.job ? `as ${shortId(d.job)}` : ""],
};

export function timelineOf(job) {
  const entries = [...(job.timeline ?? [])].reverse().map(({ at, kind, text, detail = {} }, place) => {
    const [dot, said, note] = KINDS[kind]?.(detail, job, at) ?? ["", text, ""];
    const when = h("time", { datetime: new Date(at * 1000).toISOString(), title: fullTime(at) }, time(at, { seconds: true }));
    return entry(when, dot, said, note, `${kind}-${at}-${job.timeline.length - place}`);
  });
  if (isOpen(job)) {
    const left = job.request_counts.open;
    entries.unshift(entry(h("time", null, "now"), "run", h("b", null, `${exact(left)} ${left === 1 ? "line" : "lines"} to go`), job.running ? `${count(job.running)} run` : waitText(job), "now"));
  }
  return entries;
}

function entry(when, dot, text, note, key) {
  return h("li", { key }, when, h("i", { class: `dot ${dot}` }), h("div", null, text, note && h("small", null, note)));
}
