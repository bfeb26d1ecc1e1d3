// The five answers: is it moving, when is the next done, what waits, is the machine busy, what failed.
import { count, duration, rateText, share, short, shortId, time } from "../format.js";
import { clockIcon, failIcon, icon, stateIcon } from "../icons.js";
import { state } from "../store.js";
import { reasonText } from "./job.js";
import { h } from "./render.js";

export function answers(now) {
  const o = state.overview;
  return h(
    "section",
    { class: "answers", "aria-label": "At a glance" },
    moving(o),
    next(o, now),
    waiting(o),
    machine(o),
    failed(o),
  );
}

function answer({ href, shape, tone, label, value, note, sub, bad = false }) {
  return h(
    "a",
    { href },
    h("span", { class: "label" }, h("span", { class: tone }, shape), label),
    h("span", { class: bad ? "value bad" : "value" }, value, " ", note && h("small", null, note)),
    h("span", { class: "sub", title: sub || null }, sub),
  );
}

const jobsText = (value) => `${count(value)} ${value === 1 ? "job" : "jobs"}`;

function moving(o) {
  return answer({
    href: "/?q=status:running", shape: icon("arrow"), tone: "run", label: "Moving",
    value: o ? jobsText(o.jobs.moving) : "–", note: o && `of ${count(o.jobs.open)} open`,
    sub: o ? `${rateText(o.lines_per_s).replace("/s", " lines/s").replace("/min", " lines/min")}` : "",
  });
}

function next(o, now) {
  const done = o?.next_done;
  return answer({
    href: done ? `/jobs/${done.job}` : "/?q=status:running", shape: clockIcon(), tone: "run", label: "Next done",
    value: done ? time(done.at) : "–", note: done && `in ${duration(Math.max(0, Math.round(done.at - now)))}`,
    sub: done ? (done.name ?? shortId(done.job)) : o ? (o.jobs.open ? "no estimate yet" : "nothing is open") : "",
  });
}

function waiting(o) {
  const worst = o?.worst_wait;
  return answer({
    href: "/?q=status:waiting", shape: stateIcon("waiting"), tone: "wait", label: "Waiting",
    value: o ? jobsText(o.jobs.waiting) : "–",
    sub: o ? (worst ? reasonText(worst) : o.jobs.paused ? `${jobsText(o.jobs.paused)} paused` : "none") : "",
  });
}

function machine(o) {
  const idle = o?.idle_with_work;
  const alive = o?.workers.live;
  return answer({
    href: "/fleet", shape: icon("bolt"), tone: "ink", label: "Machine",
    value: o ? (alive ? share(o.busy) : "none") : "–", note: o && alive ? "busy" : "", bad: Boolean(idle) || alive === 0,
    sub: !o ? "" : idle ? "idle with work" : alive ? `${alive} ${alive === 1 ? "worker" : "workers"} · ${short(o.tokens_per_s)} tok/s` : "no live worker",
  });
}

function failed(o) {
  const f = o?.failed_today;
  return answer({
    href: "/?q=failed:>0", shape: failIcon(), tone: f?.lines ? "fail" : "idle", label: "Failed today",
    value: f ? [count(f.lines), h("span", { class: "hide-s" }, f.lines === 1 ? " line" : " lines")] : "–",
    sub: f ? (f.lines ? `${f.kinds} ${f.kinds === 1 ? "kind" : "kinds"} · ${share(f.share)} of today's lines` : "none") : "",
  });
}
