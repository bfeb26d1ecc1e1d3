// What a person does to jobs. What can be taken back is done at once and offers an undo; the rest asks first.
import { patch, post, remove } from "../api.js";
import { count, exact, plural, shortId } from "../format.js";
import { changed, dismiss, toast } from "../store.js";
import { ask } from "./dialog.js";
import { failedLines, nameOf } from "./job.js";
import { h } from "./render.js";

const MANY_LINES = 10000; // open lines above which a cancellation asks first
const path = (job) => `/v1/jobs/${job.id}`;

/** Do it, and show what went wrong. `put` takes the job as it is now. Resolves to the answer, or null. */
export async function act(action, job, put = () => {}, detail = {}) {
  try {
    return await ACTIONS[action](job, put, detail);
  } catch (failure) {
    put({ ...job, pending: undefined });
    toast(`${nameOf(job)}: ${failure.message}`, { bad: true });
    return null;
  } finally {
    changed();
  }
}

const ACTIONS = {
  async pause(job, put) {
    put({ ...job, pending: "Pausing …" });
    changed();
    const now = await post(`${path(job)}/pause`);
    put(now);
    toast(`Paused ${nameOf(job)}`, { undo: () => act("resume", now, put) });
    return now;
  },
  async resume(job, put) {
    put({ ...job, pending: "Resuming …" });
    changed();
    const now = await post(`${path(job)}/resume`);
    put(now);
    toast(`Resumed ${nameOf(job)}`, { undo: () => act("pause", now, put) });
    return now;
  },
  async priority(job, put) {
    const priority = await askPriority(job.priority, nameOf(job));
    if (priority === null || priority === job.priority) return null;
    return ACTIONS.reprioritize(job, put, { priority });
  },
  async reprioritize(job, put, { priority }) {
    const now = await patch(path(job), { priority });
    put(now);
    toast(`Priority of ${nameOf(job)} is ${priority}`, { undo: () => act("reprioritize", now, put, { priority: job.priority }) });
    return now;
  },
  async rename(job, put) {
    const name = await askText("Rename this job", "Name", job.name ?? "");
    if (!name) return null;
    const now = await patch(path(job), { name });
    put(now);
    return now;
  },
  async retry(job, put, detail) {
    const made = await post(`${path(job)}/retry`, Object.keys(detail).length ? detail : { state: "failed" });
    toast(`Retried ${plural(made.request_counts.total, "line")} as ${shortId(made.id)}`, { undo: () => discard(made) });
    return made;
  },
  async cancel(job, put) {
    const { open } = job.request_counts;
    if (open > MANY_LINES) {
      const sure = await ask({ title: `Cancel ${nameOf(job)}?`, body: h("p", null, `${exact(open)} open lines will not run. What is finished is kept.`), accept: "Cancel the job", danger: true });
      if (!sure) return null;
    }
    const now = await post(`${path(job)}/cancel`);
    put(now);
    toast(`Cancelled ${nameOf(job)}`);
    return now;
  },
  async delete(job, put, { gone = () => {} }) {
    const sure = await ask({ title: `Delete ${nameOf(job)}?`, body: h("p", null, `Its ${plural(job.request_counts.total, "prompt")} and every answer go with it, for good.`), accept: "Delete", danger: true });
    if (!sure) return null;
    await remove(path(job));
    toast(`Deleted ${nameOf(job)}`);
    gone();
    return job;
  },
};

/** Undo a retry: the new job is cancelled and, once it has ended, deleted. */
async function discard(job) {
  try {
    await post(`${path(job)}/cancel`);
    await remove(path(job)).catch(() => null);
    toast("The new job is cancelled");
  } catch (failure) {
    toast(failure.message, { bad: true });
  }
}

function askPriority(now, what) {
  let value = now;
  return ask({
    title: `Priority of ${what}`,
    body: h("label", { class: "field" }, h("span", null, "−100 to 100; of one tenant's jobs the higher one is served first"), h("input", { class: "input", type: "number", min: -100, max: 100, value: now, autofocus: true, oninput: (event) => (value = event.target.valueAsNumber) })),
    accept: "Set",
    values: () => (Number.isInteger(value) && Math.abs(value) <= 100 ? value : undefined),
  });
}

export function askText(title, label, now = "") {
  let value = now;
  return ask({ title, body: h("label", { class: "field" }, h("span", null, label), h("input", { class: "input", value: now, autofocus: true, maxlength: 128, oninput: (event) => (value = event.target.value) })), accept: "Save", values: () => value.trim() || undefined });
}

const VERBS = { pause: "Pause", resume: "Resume", priority: "Set the priority of", retry: "Retry the failed lines of", cancel: "Cancel", delete: "Delete" };
const OPPOSITES = { pause: "resume", resume: "pause" };

/** The same for many jobs: `which` is {ids} or {q}. The service counts first. Resolves to whether it was done. */
export async function bulk(action, which, load) {
  const body = { action, ...which };
  if (action === "priority") {
    body.priority = await askPriority(0, "these jobs");
    if (body.priority === null) return false;
  }
  try {
    const { jobs, lines, largest } = await post("/v1/bulk", body);
    if (!jobs) return toast(`There is no job here to ${action === "priority" ? "change" : action}`, { bad: true });
    const noun = { retry: "failed lines", delete: "lines" }[action] ?? "open lines";
    const sure = which.ids && !["cancel", "delete", "retry"].includes(action) ? true : await ask({
      title: `${VERBS[action]} ${plural(jobs, "job")}, ${count(lines)} ${noun}?`,
      body: h("ul", { class: "steps small" }, largest.map((job) => h("li", { key: job.id }, h("b", null, h("bdi", null, job.name ?? shortId(job.id))), ` · ${plural(job.lines, "line")}`)), jobs > largest.length && h("li", { class: "muted" }, `and ${count(jobs - largest.length)} more`)),
      accept: `${VERBS[action].split(" ")[0]} ${count(jobs)}`,
      danger: ["cancel", "delete"].includes(action),
    });
    if (sure) await many({ ...body, expect: jobs }, load);
    return Boolean(sure);
  } catch (failure) {
    toast(failure.message, { bad: true });
    return false;
  }
}

/** Part after part, so that it can be stopped; what is done by then stays done. */
async function many(body, load) {
  const progress = toast(`${VERBS[body.action]} …`, { undo: () => (progress.isStopped = true), undoText: "Stop", stays: true });
  const done = [];
  const refused = [];
  let after = null;
  try {
    do {
      const part = await post("/v1/bulk", { ...body, after });
      done.push(...part.done);
      refused.push(...part.refused);
      ({ after } = part);
      progress.text = `${VERBS[body.action]}: ${count(done.length)} of ${count(body.expect)} done`;
      changed();
    } while (after && !progress.isStopped);
  } finally {
    dismiss(progress);
    await load();
  }
  const opposite = OPPOSITES[body.action];
  const undo = opposite && done.length <= 1000 ? () => many({ action: opposite, ids: done, expect: done.length }, load).catch((failure) => toast(failure.message, { bad: true })) : null;
  toast(`${VERBS[body.action]}: ${plural(done.length, "job")}${after ? ", then stopped" : ""}`, { undo });
  if (refused.length) toast(`${plural(refused.length, "job")} refused: ${refused[0].message}`, { bad: true });
}
