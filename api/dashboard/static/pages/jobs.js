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
import { matches } from "../search.js";
import { announce, canWrite, changed } from "../store.js";

const PAGE = 100;
const MOST_ROWS = 2000; // that are held for the search
const SHOWN = 200; // rows in the document at most
const DETAILS = 12; // open jobs whose rate and reason are read, each by a request
const SAVED = [
  ["All", ""],
  ["Open", "status:open"],
  ["Waiting", "status:waiting"],
  ["With failures", "failed:>0"],
  ["Ended", "status:ended"],
];
let remembered = null; // what was shown last, for the first moment of the next visit

export function open() {
  const page = {
    q: query("q"), jobs: remembered?.jobs ?? [], hasMore: remembered?.hasMore ?? false, problem: null, isLoading: !remembered,
    cursor: -1, anchor: -1, selected: new Set(), fresh: 0, washed: new Set(), pointerInside: false,
  };
  const isWall = () => query("wall") === "1";
  const search = new SearchField((text) => {
    if (text === page.q) return;
    setQuery({ q: text }, { push: true });
    self.arrive();
    changed();
  }, () => page.jobs);
  search.text = page.q;
  const filter = () => (isWall() ? "status:open" : page.q);
  /** Open jobs first, then the newest; what the search asks for. */
  const found = () => {
    const fitting = page.jobs.filter((job) => matches(job, filter()));
    return [...fitting.filter(isOpen), ...fitting.filter((job) => !isOpen(job))].slice(0, SHOWN);
  };
  page.rows = found();

  const list = (after) => get(address("/v1/jobs", { limit: PAGE, after }));

  /** An open job's rate, estimate and reason are not in the list. */
  const detailed = (jobs) => Promise.all(jobs.filter(isOpen).slice(0, DETAILS).map((job) => get(`/v1/jobs/${job.id}`).then((detail) => Object.assign(job, detail), () => null)));

  function arrange() {
    page.rows = found();
    page.fresh = 0;
    remembered = { jobs: page.jobs, hasMore: page.hasMore };
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
    if (isOpen(before) && !isOpen(job)) {
      page.washed.add(job.id);
      setTimeout(() => page.washed.delete(job.id), 1300);
      announce(`${nameOf(job)}: ${stateOf(job).word}${failedLines(job) ? `, ${exact(failedLines(job))} lines failed` : ""}`);
    }
  }

  async function load() {
    try {
      await refresh();
    } catch (failure) {
      page.problem = failure;
    }
    page.isLoading = false;
    changed();
  }

  async function refresh() {
    const { data, has_more: hasMore } = await list();
    await detailed(data);
    page.problem = null;
    const known = new Set(page.jobs.map((job) => job.id));
    for (const job of data) put({ pending: undefined, ...job });
    const fresh = data.filter((job) => !known.has(job.id));
    page.jobs = [...fresh, ...page.jobs].slice(0, MOST_ROWS);
    if (page.jobs.length <= PAGE) page.hasMore = hasMore;
    // A job that is deleted is no longer among the newest.
    const oldest = data.at(-1)?.created_at ?? 0;
    const alive = new Set(data.map((job) => job.id));
    page.jobs = page.jobs.filter((job) => alive.has(job.id) || (hasMore && job.created_at <= oldest));
    if (mayMove() || !page.rows.length) arrange();
    else page.fresh = fresh.filter((job) => matches(job, filter())).length;
    changed();
  }

  async function older() {
    try {
      const { data, has_more: hasMore } = await list(page.jobs.at(-1)?.id);
      page.jobs = [...page.jobs, ...data];
      page.hasMore = hasMore && page.jobs.length < MOST_ROWS;
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
    for (const row of page.rows.slice(from, to + 1)) page.selected[isOn ? "add" : "delete"](row.id);
    page.anchor = place;
    changed();
  }

  function selectPage() {
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
    arrive() {
      page.q = query("q");
      // What is being typed may end with a blank, where the next term begins.
      if (search.text.trim() !== page.q) search.text = page.q;
      page.cursor = -1;
      page.selected.clear();
      arrange();
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
          SAVED.map(([text, q]) =>
            h("a", { key: text, href: q ? `/?q=${encodeURIComponent(q)}` : "/", "aria-current": page.q === q ? "page" : null }, text, h("span", null, `${exact(page.jobs.filter((job) => matches(job, q)).length)}${page.hasMore ? "+" : ""}`)),
          ),
        ),
        page.selected.size > 0 && selection(page, put, load),
        page.problem ? h("div", { class: "panel" }, problem(page.problem, load)) : page.isLoading || page.rows.length ? table(page, self, now, select, selectPage) : empty(page),
        !page.problem && page.jobs.length > 0 && pager(page, older, () => { arrange(); changed(); }),
      ];
    },
  };
  return self;
}

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
    h("tbody", null, page.isLoading ? greyRows(8, 8) : page.rows.map((job, place) => row(page, job, place, now, select))),
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
    h("td", { class: "c-name" }, h("div", { class: "jobname" }, stateMark(job), h("a", { class: "t", href: hrefOf(job) }, h("bdi", null, nameOf(job))), hasName(job) && h("span", { class: "id" }, tail(job.id)))),
    h("td", { class: "c-model muted small nowrap", title: job.model }, job.model),
    h("td", { class: "c-prog" }, progress(job)),
    !waits && h("td", { class: "num c-rate" }, rateCell(job)),
    h("td", { class: "c-end small", colspan: waits ? 2 : null }, end),
    h("td", { class: "num c-failed" }, h("span", { class: failedLines(job) ? "fail" : "faint" }, count(failedLines(job)))),
    h("td", { class: "num c-tok hide-m muted" }, tokensOf(job)),
    h("td", { class: "num c-age hide-m muted" }, ageOf(job, now)),
  );
}

function selection(page, put, load) {
  const chosen = page.rows.filter((job) => page.selected.has(job.id));
  const run = (action) => bulk(action, chosen, { put, load }).then((done) => {
    if (done) page.selected.clear();
    changed();
  });
  const button = (text, action, danger) => h("button", { class: `btn sm ${danger ? "danger" : ""}`, type: "button", onclick: () => run(action) }, text);
  return h(
    "div",
    { class: "selbar", role: "group", "aria-label": "What to do with the selected jobs" },
    h("b", null, `${page.selected.size} selected`),
    button("Pause", "pause"), button("Resume", "resume"), button("Priority…", "priority"), button("Retry failed…", "retry"), button("Cancel…", "cancel", true), button("Delete…", "delete", true),
    h("button", { class: "btn sm ghost", type: "button", onclick: () => { page.selected.clear(); changed(); } }, "Clear"),
  );
}

function pager(page, older, arrange) {
  return h(
    "div",
    { class: "pager" },
    page.fresh > 0 && h("button", { class: "btn sm", type: "button", onclick: arrange }, `${page.fresh} new`),
    h("span", null, `${exact(page.rows.length)} of the newest ${plural(page.jobs.length, "job")}`),
    h("span", { class: "sp" }),
    h("span", { class: "hide-s" }, h("kbd", null, "j"), " ", h("kbd", null, "k"), " move  "),
    h("span", { class: "hide-s" }, h("kbd", null, "x"), " select  "),
    h("span", { class: "hide-s" }, h("kbd", null, "Enter"), " open"),
    page.hasMore && h("button", { class: "btn sm", type: "button", onclick: older }, "Older"),
  );
}

function empty(page) {
  if (!page.jobs.length) return h("div", { class: "panel empty" }, h("h2", null, "No jobs yet"), starters());
  const terms = page.q.split(/\s+/).filter(Boolean);
  return h(
    "div",
    { class: "panel empty" },
    h("h2", null, `None of the newest ${plural(page.jobs.length, "job")} matches this search`),
    terms.length > 1 && h("ul", { class: "steps" }, terms.map((term, place) => h("li", { key: `${term}-${place}` }, h("a", { class: "link", href: `/?q=${encodeURIComponent(terms.filter((_, other) => other !== place).join(" "))}` }, "Without ", h("code", null, term))))),
    h("p", null, h("a", { class: "link", href: "/" }, "All jobs")),
  );
}

