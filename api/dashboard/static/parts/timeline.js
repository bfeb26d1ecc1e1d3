// What happened to a job, newest first: events of the service and what the job's own times say.
import { count, duration, exact, plural, shortId, time } from "../format.js";
import { isOpen, stateOf, waitText } from "./job.js";
import { h } from "./render.js";

const nameOf = (detail) => detail.worker_name ?? detail.name ?? detail.host ?? (detail.worker ? shortId(String(detail.worker)) : "a worker");
const by = (detail) => (detail.key ? `by key ${detail.key}${detail.tenant ? `, ${detail.tenant}` : ""}` : "");

// Each kind as [dot, text, note].
const KINDS = {
  claimed: (d, job, at) => ["", `First claim, by ${nameOf(d)}`, at && job.in_progress_at ? `waited ${duration(Math.max(0, at - job.in_progress_at))}` : ""],
  worker_joined: (d) => ["", `${nameOf(d)} joins`, d.seconds ? `loaded the model in ${duration(d.seconds)}` : ""],
  worker_lost: (d) => ["fail", `${nameOf(d)} lost, its lease ran out`, d.lines ? `${plural(d.lines, "line")} free again; no answer lost` : "it held no line"],
  paused: (d) => ["", "Paused", by(d)],
  resumed: (d) => ["", "Resumed", by(d)],
  priority: (d) => ["", `Priority ${d.from ?? d.before ?? ""} → ${d.to ?? d.after ?? d.priority ?? ""}`, by(d)],
  renamed: (d) => ["", `Renamed ${d.to ?? d.name ?? ""}`, by(d)],
  retried: (d) => ["", `Retried ${d.lines ? plural(d.lines, "line") : ""}`, d.job ? `as ${shortId(d.job)}` : ""],
};

export function timelineOf(job, now) {
  const events = [];
  const add = (at, dot, text, note = "", key = text) => events.push({ at, dot, text, note, key });
  for (const event of job.timeline ?? []) {
    const { at, kind, detail = {} } = event;
    const [dot, text, note] = (KINDS[kind] ?? (() => ["", kind.replaceAll("_", " "), ""]))(detail, job, at);
    add(at, dot, text, note, `${kind}-${at}-${event.number ?? ""}`);
  }
  const has = (kind) => (job.timeline ?? []).some((event) => event.kind === kind);
  if (job.ended_at) add(job.ended_at, job.status === "completed" && !job.request_counts.failed ? "ok" : "fail", stateOf(job).word, `${plural(job.request_counts.completed, "line")} answered`, "ended");
  if (job.cancelling_at && !has("cancelling")) add(job.cancelling_at, "", "Cancellation asked for", "", "cancelling");
  add(job.in_progress_at, "", "Published", `${plural(job.request_counts.total, "line")}${job.in_progress_at - job.created_at >= 1 ? `, checked in ${duration(job.in_progress_at - job.created_at)}` : ""}`, "published");
  if (job.in_progress_at - job.created_at >= 1) add(job.created_at, "", "Upload starts", "", "created");
  events.sort((a, b) => b.at - a.at);
  const items = events.map(({ at, dot, text, note, key }) => entry(h("time", { datetime: new Date(at * 1000).toISOString(), title: new Date(at * 1000).toLocaleString("en-GB") }, time(at, { seconds: true })), dot, text, note, key));
  if (isOpen(job)) items.unshift(entry(h("time", null, "now"), "run", h("b", null, `${exact(job.request_counts.open)} ${job.request_counts.open === 1 ? "line" : "lines"} to go`), job.running ? `${count(job.running)} run` : waitText(job), "now"));
  return items;
}

function entry(when, dot, text, note, key) {
  return h("li", { key }, when, h("i", { class: `dot ${dot}` }), h("div", null, text, note && h("small", null, note)));
}
