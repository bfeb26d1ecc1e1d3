// One job: how far, when done, why not faster, what failed, its answers while they come, and what happened to it.
import { address, get } from "../api.js";
import { brief, bytes, count, duration, exact, percent, percentNumber, plural, rateText, shortId, short, time } from "../format.js";
import { failIcon, icon, stateIcon } from "../icons.js";
import { act } from "../parts/actions.js";
import { chart } from "../parts/chart.js";
import { copy, menu, problem } from "../parts/dialog.js";
import { bar, failedLines, isOpen, isWaiting, nameOf, rateOf, settled, stateOf, waitText } from "../parts/job.js";
import { Results } from "../parts/results.js";
import { timelineOf } from "../parts/timeline.js";
import { h } from "../parts/render.js";
import { go, query, setQuery } from "../router.js";
import { announce, canWrite, changed } from "../store.js";
import { deliveriesOf, webhookPanel } from "./webhooks.js";

const INCLUDE = "progress,failures,timeline,deliveries,results";

export function open({ id }) {
  const page = { job: null, problem: null, unit: query("unit") || "lines", menu: null, deliveries: null };
  const results = new Results(id);

  function put(job) {
    const before = page.job;
    page.job = { ...before, ...job };
    if (before && isOpen(before) && !isOpen(page.job)) {
      announce(`${nameOf(page.job)}: ${stateOf(page.job).word}${failedLines(page.job) ? `, ${exact(failedLines(page.job))} lines failed` : ""}`);
      load().catch(() => null);
    }
  }

  const refreshDeliveries = () => deliveriesOf(id).then((found) => { page.deliveries = found; changed(); }, () => null);

  /** The newest points of the chart. Where they lie in wider buckets than before, all are read again. */
  function addMinutes(points) {
    const known = page.job.progress ?? [];
    if (points.length && known.length && points[0].seconds !== known[0].seconds) return void load();
    page.job.progress = [...known.filter((point) => point.at < (points[0]?.at ?? Infinity)), ...points];
  }

  async function refresh() {
    const job = await get(address(`/v1/jobs/${id}`, { include: INCLUDE }));
    put({ pending: undefined, ...job });
    if (job.deliveries.length) page.deliveries = await deliveriesOf(id);
    page.problem = null;
    results.newest(job.results, job);
    changed();
  }

  async function load() {
    try {
      await refresh();
    } catch (failure) {
      page.problem = failure;
      changed();
    }
  }

  const gone = () => go("/");

  const self = {
    key: id,
    back: "/",
    title: () => (page.job ? (isOpen(page.job) ? `${percentNumber(settled(page.job), page.job.request_counts.total)} % · ${nameOf(page.job)}` : `${stateOf(page.job).word} · ${nameOf(page.job)}`) : "Job"),
    load,
    refresh,
    stream: () => ({ open: id }),
    on(event, data) {
      if (event === "gone") return void load();
      if (!page.job) return;
      if (event === "job") {
        put({ pending: undefined, ...data });
        results.grew(page.job);
      } else if (event === "minute") addMinutes(data.data);
      else if (event === "deliveries") refreshDeliveries();
      else page.job[event] = data.data;
    },
    arrive() {
      page.unit = query("unit") || "lines";
    },
    keys: {
      p: () => page.job && canWrite() && isOpen(page.job) && act(page.job.paused_at ? "resume" : "pause", page.job, put),
      r: () => page.job && canWrite() && failedLines(page.job) && act("retry", page.job, put),
      c: () => copy(id, "the id"),
      y: () => copy(`curl ${location.origin}/v1/jobs/${id} -H "Authorization: Bearer $PAGEMILL_API_KEY"`, "as curl"),
      j: () => results.move(1),
      k: () => results.move(-1),
      o: () => results.toggle(),
      "/": () => results.focusFilter(),
      Enter: () => results.cursorLine && go(`/jobs/${id}/lines/${results.cursorLine}`),
    },
    view(now) {
      const { job } = page;
      if (page.problem && !job) return missing(page.problem, load, id);
      return [
        h("nav", { class: "crumb", "aria-label": "Where you are" }, h("a", { href: "/" }, "Jobs"), "/", h("span", null, shortId(id))),
        head(page, put, gone, id),
        job ? hero(job, now) : h("section", { class: "panel hero", "aria-busy": "true" }, h("span", { class: "grey" })),
        page.problem && h("div", { class: "panel" }, problem(page.problem, load)),
        h(
          "div",
          { class: "cols" },
          h("div", null, job && throughput(page, job), job && failures(job, put), results.view(job)),
          h("div", null, job && timelinePanel(job), job && tokens(job), job && about(job), webhookPanel(page.deliveries, refresh)),
        ),
      ];
    },
  };
  return self;
}

function missing(error, load, id) {
  if (error.status !== 404) return h("div", { class: "panel" }, problem(error, load));
  return h("div", { class: "panel empty" }, h("h1", null, "No job with this id"), h("p", { class: "muted" }, h("code", null, id), " was deleted, went with its retention, or belongs to another tenant."), h("p", null, h("a", { class: "link", href: "/" }, "All jobs")));
}

function head(page, put, gone, id) {
  const { job } = page;
  if (!job) return h("div", { class: "head" }, h("h1", null, shortId(id)));
  const { shape, word, tone } = stateOf(job);
  const { total } = job.request_counts;
  const failed = failedLines(job);
  const run = (action, detail) => () => act(action, job, put, { ...detail, ...(action === "delete" ? { gone } : {}) });
  return h(
    "div",
    { class: "head" },
    h("span", { class: `badge ${tone}` }, stateIcon(shape, total ? settled(job) / total : 0), word),
    h("h1", null, h("bdi", null, nameOf(job))),
    h("button", { class: "chip", type: "button", title: `${id}: click to copy`, "aria-label": `Copy the id ${id}`, onclick: () => copy(id, "the id") }, icon("copy"), shortId(id)),
    Object.entries(job.metadata ?? {}).filter(([name]) => name !== "name").slice(0, 3).map(([name, value]) => h("span", { key: name, class: "chip hide-s" }, h("b", null, `${name}:`), h("bdi", null, value))),
    canWrite()
      ? h(
          "div",
          { class: "acts" },
          isOpen(job) && job.status !== "cancelling" && h("button", { class: "btn", type: "button", disabled: Boolean(job.pending), onclick: run(job.paused_at ? "resume" : "pause") }, job.pending ?? (job.paused_at ? "Resume" : "Pause")),
          failed > 0 && h("button", { class: "btn", type: "button", onclick: run("retry", { state: "failed" }) }, `Retry ${count(failed)}`),
          isOpen(job) && job.status !== "cancelling" && h("button", { class: "btn danger", type: "button", onclick: run("cancel") }, "Cancel…"),
          menu("More actions", icon("more"), [
            isOpen(job) && ["Priority…", run("priority")],
            ["Rename…", run("rename")],
            ["Copy as curl", () => copy(`curl ${location.origin}/v1/jobs/${id} -H "Authorization: Bearer $PAGEMILL_API_KEY"`, "as curl")],
            ["Results as JSONL", `/v1/jobs/${id}/results`],
            ["Results as CSV", `/v1/jobs/${id}/results?format=csv`],
            !isOpen(job) && ["Delete…", run("delete"), true],
          ], page),
        )
      : h("div", { class: "acts" }, h("span", { class: "badge idle", title: "This key sees and changes nothing" }, "read-only key")),
  );
}

function hero(job, now) {
  const { total, completed, failed, cancelled, expired, open: left } = job.request_counts;
  const done = settled(job);
  const running = job.running ?? 0;
  const label = `${percent(done, total)} done, ${exact(failed)} failed`;
  const mill = bar(job, { thick: true, label });
  const shade = isOpen(job) ? (job.paused_at ? "stop" : "") : job.status === "completed" ? "done" : "stop";
  const legend = h(
    "div",
    { class: "legend" },
    h("span", null, h("i", { class: `key d ${shade}` }), h("b", null, count(completed)), " done"),
    h("span", null, h("i", { class: "key f" }), h("b", null, count(failed)), " failed"),
    isOpen(job) && h("span", null, h("i", { class: "key r" }), h("b", null, count(running)), " running"),
    isOpen(job) && h("span", null, h("i", { class: "key w" }), h("b", null, count(Math.max(0, left - running))), " waiting"),
    cancelled + expired > 0 && h("span", null, h("i", { class: "key x" }), h("b", null, count(cancelled + expired)), cancelled ? " cancelled" : " expired"),
  );
  return h("section", { class: "panel hero", "aria-label": "Progress" }, isOpen(job) ? openTop(job, now) : endedTop(job), mill, legend);
}

function openTop(job, now) {
  return h("div", { class: "top" }, h("div", { class: "big" }, percentNumber(settled(job), job.request_counts.total), h("small", null, "%")), ending(job, now), reason(job, now));
}

function ending(job, now) {
  const { eta } = job;
  const left = job.request_counts.open;
  const q = h("div", { class: "q" }, "When will it be done?");
  if (job.paused_at) return h("div", null, q, h("div", { class: "a" }, `Paused since ${time(job.paused_at)}`), h("div", { class: "basis" }, `${plural(left, "line")} to go, once it is resumed`));
  if (!eta?.at) return h("div", null, q, h("div", { class: "a" }, isWaiting(job) ? "When its lines begin to run" : "Too early to tell"), h("div", { class: "basis" }, eta?.basis || `${plural(left, "line")} to go; an estimate needs 20 lines and 30 s`));
  const spread = eta.high - eta.low >= 2 ? `; ± ${brief((eta.high - eta.low) / 2)}` : "";
  const late = job.expires_at && eta.at > job.expires_at;
  return h(
    "div",
    null,
    q,
    h("div", { class: "a" }, `About ${time(eta.at)} `, h("small", null, `in ${duration(Math.max(0, Math.round(eta.at - now)))}`)),
    h("div", { class: late ? "basis fail" : "basis" }, late ? `${duration(eta.at - job.expires_at)} after its window closes · ` : "", `${plural(left, "line")} at ${eta.basis}${spread}`),
  );
}

/** Why it waits, or why it is not faster. */
function reason(job) {
  const waits = isWaiting(job);
  const text = waitText(job);
  const [first, ...rest] = (text || (job.running ? `${plural(job.running, "line")} run at once` : "")).split(/(?<=[a-z])[;:] /);
  const question = job.paused_at ? "Why does it wait?" : waits ? "Why does it wait?" : "Why not faster?";
  const second = job.paused_at ? `${plural(job.running ?? 0, "line")} still running` : rest.join("; ") || job.wait?.detail || "";
  return h(
    "div",
    null,
    h("div", { class: "q" }, question),
    h("div", { class: waits ? "a wait" : "a" }, job.paused_at ? "It is paused" : first ? first[0].toUpperCase() + first.slice(1) : "It runs as fast as the workers go"),
    second && h("div", { class: "basis" }, second),
  );
}

function endedTop(job) {
  const failed = failedLines(job);
  const lost = job.request_counts.cancelled + job.request_counts.expired;
  const took = Math.max(0, job.ended_at - job.in_progress_at);
  return h(
    "div",
    { class: "top ended" },
    h("div", null, h("div", { class: "q" }, "Done"), h("div", { class: "big" }, percentNumber(settled(job) - lost, job.request_counts.total), h("small", null, "%"))),
    h("div", null, h("div", { class: "q" }, "When did it end?"), h("div", { class: "a" }, `${stateOf(job).word.replace(" with failures", "")} ${time(job.ended_at)}, `, h("small", null, `took ${took ? duration(took) : "under 1 s"}`)), h("div", { class: "basis" }, took ? `${plural(settled(job), "line")} at ${rateText(settled(job) / took)}` : plural(settled(job), "line"))),
    h("div", null, h("div", { class: "q" }, "What failed?"), failed ? h("div", { class: "big fail" }, count(failed), h("small", null, " failed")) : h("div", { class: "a" }, lost ? `${plural(lost, "line")} never ran` : "Nothing: every line has an answer")),
  );
}

function throughput(page, job) {
  const isTokens = page.unit === "tokens";
  const points = perSecond(job, isTokens);
  const marks = (job.timeline ?? []).filter((event) => ["worker_lost", "paused", "resumed", "priority"].includes(event.kind)).map((event) => ({ at: event.at, text: markText(event), bad: event.kind === "worker_lost" }));
  const choose = (unit) => () => {
    page.unit = unit;
    setQuery({ unit: unit === "lines" ? "" : unit });
    changed();
  };
  const now = isTokens ? points.at(-1)?.value : rateOf(job);
  const title = isTokens ? "Tokens per second" : "Lines per second";
  return h(
    "section",
    { class: "panel", "aria-label": title },
    h(
      "header",
      null,
      h("h2", null, title),
      isOpen(job) && now !== undefined && now !== null && h("b", { class: "run fig" }, short(now)),
      h("span", { class: "sp" }),
      h("button", { class: "btn sm ghost", type: "button", "aria-pressed": String(!isTokens), onclick: choose("lines") }, "Lines"),
      h("button", { class: "btn sm ghost", type: "button", "aria-pressed": String(isTokens), onclick: choose("tokens") }, "Tokens"),
    ),
    chart({ points, marks, label: title, unit: title, isRunning: isOpen(job) }),
  );
}

/** Buckets of minutes as points of a rate, by the time in which lines could run; of a few seconds there is none. */
function perSecond({ progress, in_progress_at: began, ended_at: ended }, isTokens) {
  const now = Date.now() / 1000;
  return (progress ?? []).flatMap((bucket) => {
    const over = Math.min(bucket.at + bucket.seconds, ended ?? Infinity);
    const seconds = over - Math.max(bucket.at, began);
    return over > now || seconds < 10 ? [] : [{ at: bucket.at, value: (isTokens ? bucket.completion : bucket.lines) / seconds }];
  });
}

const markText = (event) => ({ worker_lost: `${event.detail?.worker_name ?? event.detail?.host ?? "worker"} lost`, paused: "paused", resumed: "resumed", priority: "priority" })[event.kind];

function failures(job, put) {
  const groups = job.failures ?? [];
  const failed = failedLines(job);
  if (!failed) return null;
  const retry = (group) => () => act("retry", job, put, { fingerprint: group.fingerprint });
  return h(
    "section",
    { class: "panel", "aria-label": "Failures" },
    h("header", null, h("span", { class: "fail" }, failIcon()), h("h2", null, `${plural(failed, "line")} failed, ${plural(groups.length, "kind")}`), h("span", { class: "sp" }), h("a", { class: "btn sm ghost", href: `/v1/jobs/${job.id}/results?format=csv&state=failed`, download: "" }, "CSV")),
    h(
      "table",
      { class: "fail-table" },
      h("caption", { class: "sr" }, "Failures by kind"),
      h("thead", { class: "sr" }, h("tr", null, ["Lines", "What", "Share", "Seen", "Action"].map((text) => h("th", null, text)))),
      h(
        "tbody",
        null,
        groups.map((group) =>
          h(
            "tr",
            { key: group.fingerprint },
            h("td", { class: "count" }, count(group.lines)),
            h("td", { class: "fp" }, h("div", { class: "m", title: group.message }, h("bdi", null, group.message)), h("div", { class: "tiny faint m" }, h("code", { class: "tiny" }, group.code), group.example && h("span", { class: "hide-s", title: group.example.message }, " · example ", h("a", { class: "link", href: `/jobs/${job.id}/lines/${group.example.line}` }, `line ${exact(group.example.line)}`)))),
            h("td", { class: "share", "aria-hidden": "true" }, h("svg", { preserveAspectRatio: "none" }, h("rect", { width: `${Math.max(2, (100 * group.lines) / failed)}%`, height: "100%" }))),
            h("td", { class: "seen small muted nowrap" }, time(group.first_at) === time(group.last_at) ? time(group.first_at) : `${time(group.first_at)} to ${time(group.last_at)}`),
            h("td", { class: "num" }, canWrite() && h("button", { class: "btn sm", type: "button", onclick: retry(group) }, `Retry ${count(group.lines)}`)),
          ),
        ),
      ),
    ),
  );
}

function timelinePanel(job) {
  const entries = timelineOf(job);
  return h("section", { class: "panel", "aria-label": "Timeline" }, h("header", null, h("h2", null, "Timeline")), h("div", { class: "body" }, h("ol", { class: "time" }, entries)));
}

const fact = (name, value, note) => [h("dt", { title: name }, name), h("dd", { title: String(value) }, h("bdi", null, value), note && [" ", h("small", null, note)])];

function tokens(job) {
  const { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: made } = job.usage;
  const done = settled(job);
  const last = perSecond(job, true).at(-1)?.value;
  return h(
    "section",
    { class: "panel", "aria-label": "Tokens" },
    h("header", null, h("h2", null, "Tokens")),
    h(
      "div",
      { class: "body" },
      h(
        "dl",
        { class: "facts" },
        fact("Prompt", short(prompt)),
        fact("of them cached", short(cached), prompt ? percent(cached, prompt) : ""),
        fact("Generated", short(made)),
        isOpen(job) && last !== undefined && fact("Now", `${short(last)} tok/s`),
        done > 0 && fact("Per line", `${short(Math.round(prompt / done))} in, ${short(Math.round(made / done))} out`),
        job.recomputed_tokens !== undefined && fact("Tokens paid twice", short(job.recomputed_tokens)),
      ),
    ),
  );
}

function about(job) {
  return h(
    "section",
    { class: "panel", "aria-label": "About" },
    h("header", null, h("h2", null, "About")),
    h(
      "div",
      { class: "body" },
      h(
        "dl",
        { class: "facts" },
        fact("Model", job.model),
        fact("Priority", job.priority),
        fact("Window", job.completion_window ?? "none", job.expires_at ? `closes ${time(job.expires_at)}` : ""),
        job.tenant && fact("Tenant", job.tenant),
        Object.entries(job.metadata ?? {}).map(([name, value]) => fact(`metadata.${name}`, value)),
        job.prompt_bytes !== undefined && fact("Prompts", bytes(job.prompt_bytes)),
        job.webhook?.url && fact("Webhook", job.webhook.url.replace(/^https?:\/\//, "")),
        fact("Sent", time(job.created_at)),
        job.retry_of && [h("dt", null, "Retry of"), h("dd", null, h("a", { class: "link", href: `/jobs/${job.retry_of}` }, shortId(job.retry_of)))],
      ),
    ),
  );
}


