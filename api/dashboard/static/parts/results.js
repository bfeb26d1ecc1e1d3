// Answers while they come: newest first, a page by `seq` at a time, a row opens in place.
import { address, get, ndjson } from "../api.js";
import { count, duration, exact, visible } from "../format.js";
import { go } from "../router.js";
import { changed } from "../store.js";
import { greyRows, problem } from "./dialog.js";
import { isOpen } from "./job.js";
import { phases } from "./phases.js";
import { h } from "./render.js";

const PAGE = 50;
const FEW = 12; // rows until somebody wants more

/** {code, message} of a line without an answer, else null. */
export const failureOf = (row) => (row.state === "completed" ? null : { code: row.error_code, message: row.error_message ?? row.error_code ?? row.state });

export class Results {
  constructor(jobId) {
    Object.assign(this, { jobId, rows: null, state: "", before: null, opened: null, details: new Map(), cursor: -1, problem: null, fresh: 0, lastSeq: 0, hasMore: false, readAt: 0 });
  }

  get cursorLine() {
    return this.rows?.[this.cursor]?.line ?? null;
  }

  /** Whether somebody reads these rows, so that they stay. */
  get isRead() {
    return this.before !== null || this.state || this.opened !== null || this.cursor >= 0;
  }

  /** The newest ones as the job's page got them. */
  newest(rows, job) {
    this.lastSeq = job.last_seq;
    if (this.isRead) this.fresh = Math.max(0, job.last_seq - (this.rows?.[0]?.seq ?? 0));
    else this.take(rows);
  }

  /** The job has more answers, perhaps: read the newest, at most every two seconds. */
  grew(job) {
    if (job.last_seq === this.lastSeq || Date.now() < this.readAt + 2000) return;
    if (this.isRead) return void this.newest(null, job);
    this.readAt = Date.now();
    this.lastSeq = job.last_seq;
    this.load();
  }

  take(rows) {
    this.rows = [...rows].sort((a, b) => b.seq - a.seq);
    this.hasMore = this.rows.length >= PAGE && this.rows.at(-1).seq > 1;
    this.fresh = 0;
    this.problem = null;
  }

  async load() {
    try {
      const found = await ndjson(address(`/v1/jobs/${this.jobId}/results`, { before: this.before ?? (this.lastSeq || 0) + 1, limit: PAGE, state: this.state, preview: 200 }));
      this.take(found.lines);
    } catch (failure) {
      this.problem = failure;
    }
    changed();
  }

  shown() {
    return this.isWhole || this.before !== null ? this.rows : this.rows.slice(0, FEW);
  }

  older() {
    this.before = this.rows.at(-1).seq;
    this.cursor = -1;
    this.load();
  }

  back() {
    this.before = null;
    this.cursor = -1;
    this.opened = null;
    this.load();
  }

  choose(state) {
    this.state = state;
    this.back();
  }

  move(step) {
    if (!this.rows?.length) return;
    this.cursor = Math.max(0, Math.min(this.shown().length - 1, this.cursor + step));
    changed();
    requestAnimationFrame(() => document.querySelector(".res tr.cursor")?.scrollIntoView({ block: "nearest" }));
  }

  toggle(line = this.cursorLine) {
    this.opened = this.opened === line ? null : line;
    changed();
    if (this.opened !== null && !this.details.has(line)) {
      get(`/v1/jobs/${this.jobId}/lines/${line}`).catch(() => ({})).then((detail) => {
        this.details.clear();
        this.details.set(line, detail);
        changed();
      });
    }
  }

  focusFilter() {
    document.getElementById("go-to")?.focus();
  }

  view(job) {
    const columns = 6;
    const button = (text, state) => h("button", { class: "btn sm ghost", type: "button", "aria-pressed": String(this.state === state), onclick: () => this.choose(state) }, text);
    return h(
      "section",
      { class: "panel", "aria-label": "Results" },
      h(
        "header",
        null,
        h("h2", null, "Results"),
        h("span", { class: "muted small" }, job ? (job.last_seq ? `newest first, ${count(job.last_seq)}` : "none yet") : ""),
        this.fresh > 0 && h("button", { class: "btn sm", type: "button", onclick: () => this.back() }, `${count(this.fresh)} new`),
        h("span", { class: "sp" }),
        job && job.request_counts.failed > 0 && [button("All", ""), button("Failed", "failed")],
        h("form", { class: "hide-s", onsubmit: (event) => { event.preventDefault(); this.goTo(event.target.elements.line.value.trim()); } }, h("input", { class: "input go-to", id: "go-to", name: "line", "aria-label": "Go to a line by its number", placeholder: "go to line …", inputmode: "numeric", autocomplete: "off" })),
        h("a", { class: "btn sm ghost hide-s", href: `/v1/jobs/${this.jobId}/results?format=csv`, download: `${this.jobId}.csv` }, "CSV"),
        h("a", { class: "btn sm ghost", href: `/v1/jobs/${this.jobId}/results`, download: `${this.jobId}.jsonl` }, "JSONL"),
      ),
      this.problem
        ? problem(this.problem, () => this.load())
        : this.rows && !this.rows.length
          ? h("p", { class: "body muted small" }, this.state ? "No line of this kind." : job && isOpen(job) ? "Answers appear here as soon as lines end." : "No line has an answer.")
          : h(
              "table",
              { class: "res", "aria-busy": String(!this.rows) },
              h("caption", { class: "sr" }, "Results, newest first"),
              h("thead", null, h("tr", null, h("th", { class: "num" }, "Line"), h("th", { class: "hide-s" }, "Id"), h("th", null, "Answer"), h("th", { class: "num hide-s" }, "Prompt"), h("th", { class: "num hide-s" }, "Out"), h("th", { class: "num" }, "Took"))),
              h("tbody", null, this.rows ? this.shown().flatMap((row, place) => this.row(row, place, columns)) : greyRows(5, columns)),
            ),
      this.rows && (this.hasMore || this.before !== null || this.rows.length > this.shown().length) && h("div", { class: "pager body" }, this.before !== null && h("button", { class: "btn sm", type: "button", onclick: () => this.back() }, "Newest"), h("span", { class: "sp" }), this.rows.length > this.shown().length ? h("button", { class: "btn sm", type: "button", onclick: () => { this.isWhole = true; changed(); } }, `Show ${this.rows.length - FEW} more`) : this.hasMore && h("button", { class: "btn sm", type: "button", onclick: () => this.older() }, "Older")),
    );
  }

  goTo(text) {
    const line = Number(text.replaceAll(/[^\d]/g, ""));
    if (line > 0) go(`/jobs/${this.jobId}/lines/${line}`);
  }

  row(row, place, columns) {
    const { line } = row;
    const isOpened = this.opened === line;
    const failure = failureOf(row);
    const text = failure ? failure.message : (row.text ?? "");
    const took = row.took_ms === null || row.took_ms === undefined ? null : row.took_ms / 1000;
    const main = h(
      "tr",
      { key: row.seq, class: `${isOpened ? "open" : ""} ${place === this.cursor ? "cursor" : ""}` },
      h("td", { class: "num muted" }, h("a", { href: `/jobs/${this.jobId}/lines/${line}` }, exact(line))),
      h("td", { class: "hide-s muted clip" }, h("bdi", null, row.custom_id === `request-${line}` ? "" : row.custom_id)),
      h("td", { class: "ans" }, h("button", { type: "button", class: failure ? "fail" : "", "aria-expanded": String(isOpened), onclick: () => this.toggle(line) }, h("bdi", null, visible(text).slice(0, 200) || h("span", { class: "faint" }, "(empty)")))),
      h("td", { class: "num hide-s muted" }, count(row.prompt_tokens)),
      h("td", { class: "num hide-s muted" }, count(row.completion_tokens)),
      h("td", { class: "num muted" }, took === null ? "–" : duration(took)),
    );
    if (!isOpened) return [main];
    return [main, h("tr", { key: `peek-${row.seq}`, class: "peek" }, h("td", { colspan: columns }, h("p", { class: "text", dir: "auto" }, visible(text), row.is_cut && " …"), phases(this.details.get(line), row, { href: `/jobs/${this.jobId}/lines/${line}`, label: `Timeline of line ${exact(line)}` })))];
  }
}
