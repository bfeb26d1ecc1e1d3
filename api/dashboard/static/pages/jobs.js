// All jobs: the five answers, the search, and a table that changes in place and never moves a row under the pointer.
import { address, get } from "../api.js";
import { count, exact, plural, tail } from "../format.js";
import { act, bulk } from "../parts/actions.js";
import { answers } from "../parts/answers.js";
import { SearchField } from "../parts/combobox.js";
import { copy, greyRows, problem } from "../parts/dialog.js";
import { ageOf, endCell, failedLines, hasName, hrefOf, isOpen, isWaiting, nameOf, progress, rateCell, stateMark, stateOf, tokensOf, waitText, why } from "../parts/job.js";
import { h } from "../parts/render.js";
import { starters } from "../parts/starters.js";
import { go, query, setQuery } from "../router.js";
import { announce, canWrite, changed, state } from "../store.js";

const PAGE = 100;
const SHOWN = 200; // rows in the document at most
const LIVE = 100; // open jobs on a screen that are listened to
const NONE = `job_${"0".repeat(32)}`; // older than every job
const SAVED = [
  ["All", "", "all"],
  ["Open", "status:open", "open"],
  ["Waiting", "status:waiting", "waiting"],
  ["With failures", "failed:>0", "with_failures"],
  ["At risk", "deadline:risk", "at_risk"],
  ["Ended", "-status:open", "ended"],
];
let remembered = null; // what was shown last, for the first moment of the next visit

export function open() {
  const page = {
    q: query("q"), jobs: [], rows: [], counts: null, last: null, hasMore: false, problem: null, isLoading: true,
    cursor: -1, anchor: -1, selected: new Set(), isEvery: false, isDeep: false, fresh: 0, washed: new Set(), pointerInside: false,
  };
  if (remembered?.q === page.q) Object.assign(page, remembered);
  const isWall = () => query("wall") === "1";
  const search = new SearchField((text) => {
    if (text === page.q) return;
    setQuery({ q: text }, { push: true });
    self.arrive();
    load();
  });
  search.text = page.q;
  const filter = () => (isWall() ? "status:open" : page.q);
  const list = (q, after) => get(address("/v1/jobs", { q, limit: PAGE, after }));

  /** The first page. Open jobs stand first, so they are asked for by themselves where the search does not say which. */
  async function first() {
    const q = filter();
    const [newest, opened] = await Promise.all([list(q), /(^|\s)-?status:/.test(q) ? null : list(`${q} status:open`)]);
    const jobs = new Map([...(opened?.data ?? []), ...newest.data].map((job) => [job.id, job]));
    return { jobs: [...jobs.values()], last: newest.last_id, hasMore: newest.has_more };
  }

  /** Open jobs first, then the newest: ids are ordered by time. */
  function arrange() {
    page.rows = [...page.jobs].sort((a, b) => isOpen(b) - isOpen(a) || (a.id < b.id ? 1 : -1)).slice(0, SHOWN);
    page.fresh = 0;
    if (!page.isDeep) remembered = { q: page.q, jobs: page.jobs, rows: page.rows, counts: page.counts, last: page.last, hasMore: page.hasMore };
  }

  /** Whether rows may change their places: nobody points at, selects or reads one. */
  const mayMove = () => scrollY < 80 && !page.selected.size && page.cursor < 0 && !page.pointerInside;

  function put(job) {
    const place = page.jobs.findIndex((row) => row.id === job.id);
    if (place < 0) return;
    const before = page.jobs[place];
    page.jobs[place] = { ...before, ...job };
    const row = page.rows.findIndex((one) => one.id === job.id);
    if (row >= 0) page.rows[row] = page.jobs[place];
    if (stateOf(before).word !== stateOf(page.jobs[place]).word && !job.pending) soon();
    if (isOpen(before) && !isOpen(job)) {
      page.washed.add(job.id);
      setTimeout(() => page.washed.delete(job.id), 1300);
      announce(`${nameOf(job)}: ${stateOf(job).word}${failedLines(job) ? `, ${exact(failedLines(job))} lines failed` : ""}`);
    }
  }

  async function load({ isAsked = false } = {}) {
    page.isLoading = true;
    changed();
    try {
      await refresh({ isAsked });
    } catch (failure) {
      page.problem = failure;
    }
    page.isLoading = false;
    changed();
  }

  async function refresh({ isAsked = false } = {}) {
    const q = filter();
    if (isAsked) page.shownFor = null;
    // Far down, rows stay; those that run are current by the stream.
    if (page.isDeep && page.shownFor === q) return;
    const [found, counts] = await Promise.all([first(), get(address("/v1/jobs/counts", { q }))]);
    if (q !== filter()) return;
    page.problem = null;
    page.counts = counts;
    const known = new Set(page.jobs.map((job) => job.id));
    for (const job of found.jobs) put({ pending: undefined, ...job });
    const isFirst = page.shownFor !== q;
    // Older pages stay as they were read.
    const older = isFirst ? [] : page.jobs.filter((job) => job.id < found.last);
    page.jobs = [...found.jobs, ...older.filter((job) => !found.jobs.some((one) => one.id === job.id))];
    if (!older.length) Object.assign(page, { last: found.last, hasMore: found.hasMore });
    page.shownFor = q;
    page.isDeep = false;
    if (isAsked || isFirst || mayMove()) arrange();
    else page.fresh = found.jobs.filter((job) => !known.has(job.id)).length;
    changed();
  }

  let isDue = null;

  /** Read the list again: what it holds, or its order, is another one now. */
  function soon() {
    isDue ??= setTimeout(() => {
      isDue = null;
      refresh().catch(() => null);
    }, 1000);
  }

  async function older() {
    try {
      const found = await list(filter(), page.last);
      const known = new Set(page.jobs.map((job) => job.id));
      const all = [...page.rows, ...found.data.filter((job) => !known.has(job.id))];
      Object.assign(page, { jobs: all.slice(-SHOWN), last: found.last_id, hasMore: found.has_more, isDeep: page.isDeep || all.length > SHOWN });
      arrange();
    } catch (failure) {
      page.problem = failure;
    }
    changed();
  }

  function move(step) {
    if (!page.rows.length) return;
    page.cursor = Math.max(0, Math.min(page.rows.length - 1, page.cursor + step));
    changed();
    requestAnimationFrame(() => document.querySelector("tr.cursor")?.scrollIntoView({ block: "nearest" }));
  }

  function select(place, isRange) {
    const job = page.rows[place];
    if (!job) return;
    const isOn = !page.selected.has(job.id);
    const [from, to] = isRange && page.anchor >= 0 ? [Math.min(page.anchor, place), Math.max(page.anchor, place)] : [place, place];
    page.isEvery = false;
    for (const row of page.rows.slice(from, to + 1)) page.selected[isOn ? "add" : "delete"](row.id);
    page.anchor = place;
    changed();
  }

  function selectPage() {
    page.isEvery = false;
    const isOn = page.rows.some((row) => !page.selected.has(row.id));
    page.selected = new Set(isOn ? page.rows.map((row) => row.id) : []);
    changed();
  }

  const atCursor = (action) => () => {
    const job = page.rows[page.cursor];
    if (job) action(job);
  };

  const self = {
    title: () => (isWall() ? "Wall" : page.q ? `${page.q} · Jobs` : "Jobs"),
    load,
    refresh,
    close: () => clearTimeout(isDue),
    stream: () => ({
      jobs: page.rows.filter(isOpen).slice(0, LIVE).map((job) => job.id),
      q: filter(),
      newest: page.jobs.reduce((newest, { id }) => (id > newest ? id : newest), NONE),
    }),
    on(event, data) {
      if (event === "job") put({ pending: undefined, ...data });
      else if (event === "gone" || mayMove()) soon();
      else if (event === "jobs.new") page.fresh = data.count;
    },
    arrive() {
      page.q = query("q");
      // What is being typed may end with a blank, where the next term begins.
      if (search.text.trim() !== page.q) search.text = page.q;
      page.cursor = -1;
      page.selected.clear();
    },
    keys: {
      "/": () => search.focus(),
      j: () => move(1),
      k: () => move(-1),
      ArrowDown: () => move(1),
      ArrowUp: () => move(-1),
      Enter: atCursor((job) => go(hrefOf(job))),
      x: () => select(page.cursor, false),
      X: () => select(page.cursor, true),
      "*": selectPage,
      p: atCursor((job) => canWrite() && isOpen(job) && act(job.paused_at ? "resume" : "pause", job, put)),
      r: atCursor((job) => canWrite() && failedLines(job) && act("retry", job, put)),
      c: atCursor((job) => copy(job.id, "the id")),
    },
    view(now) {
      return [
        h("h1", { key: "h1", class: "sr" }, "Jobs"),
        answers(now),
        h(
          "div",
          { class: "tools" },
          search.view("status:waiting  model:qwen3-8b  metadata.team:search  failed:>0"),
          canWrite() ? h("a", { class: "btn main hide-s", href: "/new" }, "New job") : h("span", { class: "badge idle hide-s", title: "This key sees and changes nothing" }, "read-only key"),
        ),
        hint(search),
        h(
          "nav",
          { class: "tabs", "aria-label": "Saved searches" },
          SAVED.map(([text, q, name]) =>
            h("a", { key: text, href: q ? `/?q=${encodeURIComponent(q)}` : "/", "aria-current": page.q === q ? "page" : null }, text, h("span", null, page.counts ? many(page.counts[name]) : "")),
          ),
        ),
        page.selected.size > 0 && selection(page, filter, () => load({ isAsked: true })),
        page.problem ? h("div", { class: "panel" }, problem(page.problem, load)) : page.isLoading || page.rows.length ? table(page, self, now, select, selectPage) : empty(page),
        !page.problem && page.jobs.length > 0 && pager(page, older, () => load({ isAsked: true })),
      ];
    },
  };
  return self;
}

/** Whether it is another tenant's, as an operator sees them. */
const isForeign = (job) => job.tenant && job.tenant !== state.me?.tenant;

/** A count of the service, which ends at ten thousand. */
const many = (value) => (value >= 10000 ? "10k+" : exact(value));

function hint(search) {
  const wrong = search.wrong();
  return wrong && h("p", { class: "hint" }, "There is no field ", h("b", null, wrong.field), wrong.meant ? [". Did you mean ", h("button", { type: "button", class: "link", onclick: () => search.replaceField(wrong.field, wrong.meant) }, wrong.meant), "?"] : ".");
}

function table(page, self, now, select, selectPage) {
  const all = page.rows.length > 0 && page.rows.every((row) => page.selected.has(row.id));
  return h(
    "table",
    {
      class: "jobs", "aria-busy": String(page.isLoading),
      onmouseenter: () => (page.pointerInside = true), onmouseleave: () => (page.pointerInside = false),
    },
    h("caption", { class: "sr" }, "Jobs: open ones first, then the newest"),
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        canWrite() && h("th", { class: "sel" }, h("input", { type: "checkbox", "aria-label": "Select all on this page", checked: all, indeterminate: !all && page.selected.size > 0, onchange: selectPage })),
        h("th", null, "Job"),
        h("th", { class: "c-model" }, "Model"),
        h("th", { class: "c-prog" }, "Progress"),
        h("th", { class: "num c-rate" }, "Lines/s"),
        h("th", { class: "c-end" }, "Ends"),
        h("th", { class: "num c-failed" }, "Failed"),
        h("th", { class: "num c-tok hide-m" }, "Tokens"),
        h("th", { class: "num c-age hide-m" }, "Age"),
      ),
    ),
    h("tbody", null, page.isLoading && !page.rows.length ? greyRows(8, 8) : page.rows.map((job, place) => row(page, job, place, now, select))),
  );
}

function row(page, job, place, now, select) {
  const waits = isWaiting(job);
  const classes = [place === page.cursor && "cursor", page.selected.has(job.id) && "selected", waits && "waits", !isOpen(job) && "ended", page.washed.has(job.id) && "washed"];
  const end = waits ? why(waitText(job)) : endCell(job, now);
  return h(
    "tr",
    { key: job.id, class: classes.filter(Boolean).join(" ") },
    canWrite() && h("td", { class: "sel" }, h("input", { type: "checkbox", "aria-label": `Select ${nameOf(job)}`, checked: page.selected.has(job.id), onclick: (event) => select(place, event.shiftKey) })),
    h("td", { class: "c-name" }, h("div", { class: "jobname" }, stateMark(job), h("a", { class: "t", href: hrefOf(job) }, h("bdi", null, nameOf(job))), isForeign(job) ? h("span", { class: "id", title: `Tenant ${job.tenant}` }, h("bdi", null, job.tenant)) : hasName(job) && h("span", { class: "id" }, tail(job.id)))),
    h("td", { class: "c-model muted small nowrap", title: job.model }, job.model),
    h("td", { class: "c-prog" }, progress(job)),
    !waits && h("td", { class: "num c-rate" }, rateCell(job)),
    h("td", { class: "c-end small", colspan: waits ? 2 : null }, end),
    h("td", { class: "num c-failed" }, h("span", { class: failedLines(job) ? "fail" : "faint" }, count(failedLines(job)))),
    h("td", { class: "num c-tok hide-m muted" }, tokensOf(job)),
    h("td", { class: "num c-age hide-m muted" }, ageOf(job, now)),
  );
}

function selection(page, filter, load) {
  const matching = page.counts?.matching ?? 0;
  const every = page.isEvery;
  const run = (action) => bulk(action, every ? { q: filter() } : { ids: [...page.selected] }, load).then((done) => {
    if (done) Object.assign(page, { selected: new Set(), isEvery: false });
    changed();
  });
  const button = (text, action, danger) => h("button", { class: `btn sm ${danger ? "danger" : ""}`, type: "button", onclick: () => run(action) }, text);
  return h(
    "div",
    { class: "selbar", role: "group", "aria-label": "What to do with the selected jobs" },
    h("b", null, every ? `All ${many(matching)} that match` : `${page.selected.size} selected`),
    !every && matching > page.rows.length && page.rows.every((row) => page.selected.has(row.id)) && h("button", { class: "btn sm ghost", type: "button", onclick: () => { page.isEvery = true; changed(); } }, `Select all ${many(matching)} that match`),
    button("Pause", "pause"), button("Resume", "resume"), button("Priority…", "priority"), button("Retry failed…", "retry"), button("Cancel…", "cancel", true), button("Delete…", "delete", true),
    h("button", { class: "btn sm ghost", type: "button", onclick: () => { Object.assign(page, { selected: new Set(), isEvery: false }); changed(); } }, "Clear"),
  );
}

function pager(page, older, arrange) {
  return h(
    "div",
    { class: "pager" },
    page.fresh > 0 && h("button", { class: "btn sm", type: "button", onclick: arrange }, `${page.fresh} new`),
    h("span", null, `${exact(page.rows.length)} of ${page.counts ? many(page.counts.matching) : "…"} jobs`),
    h("span", { class: "sp" }),
    h("span", { class: "hide-s" }, h("kbd", null, "j"), " ", h("kbd", null, "k"), " move  "),
    h("span", { class: "hide-s" }, h("kbd", null, "x"), " select  "),
    h("span", { class: "hide-s" }, h("kbd", null, "Enter"), " open"),
    page.isDeep && h("button", { class: "btn sm", type: "button", onclick: arrange }, "Newest"),
    page.hasMore && h("button", { class: "btn sm", type: "button", onclick: older }, "Older"),
  );
}

function empty(page) {
  if (!page.counts?.all) return h("div", { class: "panel empty" }, h("h2", null, "No jobs yet"), starters());
  const terms = page.q.split(/\s+/).filter(Boolean);
  return h(
    "div",
    { class: "panel empty" },
    h("h2", null, `None of ${many(page.counts.all)} jobs matches this search`),
    terms.length > 1 && h("ul", { class: "steps" }, terms.map((term, place) => h("li", { key: `${term}-${place}` }, h("a", { class: "link", href: `/?q=${encodeURIComponent(terms.filter((_, other) => other !== place).join(" "))}` }, "Without ", h("code", null, term))))),
    h("p", null, h("a", { class: "link", href: "/" }, "All jobs")),
  );
}
