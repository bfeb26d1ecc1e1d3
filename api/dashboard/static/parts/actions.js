// What a person does to jobs. What can be taken back is done at once and offers an undo; the rest asks first.
import { patch, post, remove } from "../api.js";
import { count, exact, plural, shortId } from "../format.js";
import { changed, toast } from "../store.js";
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

/** The same for many jobs. Resolves to whether it was done. */
export async function bulk(action, jobs, { put, load }) {
  const lines = jobs.reduce((sum, job) => sum + (action === "retry" ? failedLines(job) : action === "delete" ? job.request_counts.total : job.request_counts.open), 0);
  const noun = { retry: "failed lines", delete: "lines" }[action] ?? "open lines";
  let priority = 0;
  if (action === "priority") {
    priority = await askPriority(0, plural(jobs.length, "job"));
    if (priority === null) return false;
  } else if (["cancel", "delete", "retry"].includes(action)) {
    const largest = [...jobs].sort((a, b) => b.request_counts.total - a.request_counts.total).slice(0, 3);
    const sure = await ask({
      title: `${VERBS[action]} ${plural(jobs.length, "job")}, ${count(lines)} ${noun}?`,
      body: h("ul", { class: "steps small" }, largest.map((job) => h("li", { key: job.id }, h("b", null, h("bdi", null, nameOf(job))), ` · ${plural(job.request_counts.total, "line")}`)), jobs.length > 3 && h("li", { class: "muted" }, `and ${jobs.length - 3} more`)),
      accept: `${VERBS[action].split(" ")[0]} ${jobs.length}`,
      danger: action !== "retry",
    });
    if (!sure) return false;
  }
  return many(action, jobs, priority, { put, load });
}

async function many(action, jobs, priority, { put, load }) {
  const requests = {
    retry: (job) => post(`${path(job)}/retry`, { state: "failed" }),
    delete: (job) => remove(path(job)),
    priority: (job) => patch(path(job), { priority }),
  };
  const done = [];
  const refused = [];
  for (const job of jobs) {
    // One after the other: fifty at once would be a burst that other tenants feel.
    try {
      const now = await (requests[action] ?? ((one) => post(`${path(one)}/${action}`)))(job);
      if (["pause", "resume", "cancel", "priority"].includes(action)) put(now);
      done.push(job);
    } catch (failure) {
      refused.push(`${nameOf(job)}: ${failure.message}`);
    }
  }
  const opposite = { pause: "resume", resume: "pause" }[action];
  if (done.length) toast(`${VERBS[action]}: ${plural(done.length, "job")}`, { undo: opposite ? () => many(opposite, done, 0, { put, load }) : null });
  if (refused.length) toast(`${plural(refused.length, "job")} refused: ${refused[0]}`, { bad: true });
  await load();
  return true;
}
