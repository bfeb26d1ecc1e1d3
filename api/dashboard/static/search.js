// The language of the search field: `["-"] (field ":" value {"," value} | word)`, joined by AND, commas by OR.
import { plural } from "./format.js";
import { isOpen, nameOf, stateOf } from "./parts/job.js";

export const FIELDS = [
  ["status", "running, waiting, paused, completed …"],
  ["model", "the model's name"],
  ["id", "beginning of an id"],
  ["name", "beginning of a name"],
  ["priority", "priority:>0"],
  ["created", "created:>2h, younger than two hours"],
  ["ended", "ended:>1d, within the last day"],
  ["lines", "lines:>10k"],
  ["failed", "failed:>0"],
  ["tokens", "tokens:>1M"],
  ["deadline", "deadline:<1h"],
  ["wait", "no_worker, priority …"],
  ["metadata.", "metadata.team:search"],
];
const NAMES = new Set(FIELDS.map(([name]) => name));

/**
 * The terms of a query with their places in it.
 * @returns {{start: number, end: number, text: string, negated: boolean, field: string | null, value: string, known: boolean}[]}
 */
export function parse(query) {
  const terms = [];
  const pattern = /(-?)(?:([A-Za-z_][\w.-]*):)?((?:"[^"]*"?|[^\s"])*)/g;
  for (const found of query.matchAll(pattern)) {
    if (!found[0]) continue;
    const [text, minus, field = null, value] = found;
    const known = field === null || NAMES.has(field) || /^metadata\.[\w.-]+$/.test(field);
    terms.push({ start: found.index, end: found.index + text.length, text, negated: minus === "-", field, value, known });
  }
  return terms;
}

/** The field that was probably meant, or null where none is near. */
export function nearest(field) {
  let best = null;
  let least = 3;
  for (const name of NAMES) {
    const away = distance(field.toLowerCase(), name);
    if (away < least) [best, least] = [name, away];
  }
  return best;
}

function distance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, place) => place);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}

/** What is being typed at `caret`: the beginning of a field or of one of its values. */
export function typedAt(query, caret) {
  const term = parse(query).find((candidate) => candidate.start <= caret && caret <= candidate.end);
  if (!term) return { start: caret, end: caret, field: null, prefix: "" };
  if (term.field === null) {
    const start = term.start + (term.negated ? 1 : 0);
    return { start, end: term.end, field: null, prefix: query.slice(start, caret) };
  }
  const valueStart = term.end - term.value.length;
  if (caret < valueStart) return { start: term.start + (term.negated ? 1 : 0), end: term.end, field: null, prefix: query.slice(term.start + (term.negated ? 1 : 0), caret) };
  const start = Math.max(query.lastIndexOf(",", caret - 1) + 1, valueStart);
  return { start, end: term.end, field: term.field, prefix: query.slice(start, caret).replace(/^[<>]=?|"/g, "") };
}

/** What a job has under a field: words for those that are compared as text, a number for the others. */
function valueOf(job, field, now) {
  switch (field) {
    case "status":
      return [stateOf(job).word.split(" ")[0].toLowerCase(), job.status, isOpen(job) ? "open" : "ended"];
    case "name":
      return [nameOf(job)];
    case "id":
    case "model":
      return [job[field]];
    case "wait":
      return [job.wait?.code ?? ""];
    case "priority":
      return job.priority;
    case "lines":
      return job.request_counts.total;
    case "failed":
      return job.request_counts.failed;
    case "tokens":
      return job.usage.total_tokens;
    case "created":
      return now - job.created_at;
    case "ended":
      return job.ended_at === null ? null : now - job.ended_at;
    case "deadline":
      return job.expires_at === null ? null : job.expires_at - now;
    default:
      return [job.metadata[field.slice("metadata.".length)] ?? ""];
  }
}

const UNITS = { s: 1, m: 60, min: 60, h: 3600, d: 86400, k: 1e3, M: 1e6, G: 1e9 };
const AGES = new Set(["created", "ended"]);
const PREFIXES = new Set(["id", "name"]);

function fits(job, field, wanted, now) {
  const value = valueOf(job, field, now);
  if (Array.isArray(value)) {
    const text = wanted.replaceAll('"', "").toLowerCase();
    return value.some((one) => (PREFIXES.has(field) ? one.toLowerCase().startsWith(text) : one.toLowerCase() === text));
  }
  const [, sign, digits, unit] = wanted.match(/^([<>]=?)?(-?[\d.]+)(s|min|m|h|d|k|M|G)?$/) ?? [];
  if (digits === undefined || value === null) return false;
  // Newer than two hours is an age below two hours.
  const difference = (value - Number(digits) * (UNITS[unit] ?? 1)) * (AGES.has(field) ? -1 : 1);
  return { ">": difference > 0, ">=": difference >= 0, "<": difference < 0, "<=": difference <= 0 }[sign] ?? difference === 0;
}

/** Whether a job is what a query asks for. A bare word is the beginning of a name or id. */
export function matches(job, query, now = Date.now() / 1000) {
  return parse(query).every((term) => {
    const values = term.value.match(/(?:"[^"]*"?|[^,"])+/g) ?? [""];
    const found = values.some((value) => (term.field === null ? fits(job, "name", value, now) || fits(job, "id", value, now) : term.known && fits(job, term.field, value, now)));
    return found !== term.negated;
  });
}

/** Suggestions as {text, note, insert}: fields, then the values that `jobs` have, the most frequent first. */
export function suggest(typed, jobs) {
  const prefix = typed.prefix.toLowerCase();
  if (typed.field === null) {
    return FIELDS.filter(([name]) => name.startsWith(prefix)).slice(0, 9).map(([name, note]) => ({
      text: name.endsWith(".") ? `${name}…` : `${name}:`, note, insert: name.endsWith(".") ? name : `${name}:`,
    }));
  }
  const counts = new Map();
  for (const job of jobs) {
    const values = valueOf(job, typed.field, 0);
    for (const value of Array.isArray(values) ? new Set(values) : []) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  return [...counts].filter(([value]) => value.toLowerCase().startsWith(prefix)).sort((a, b) => b[1] - a[1]).slice(0, 9).map(([value, count]) => ({
    text: value, note: plural(count, "job"), insert: `${/[\s",]/.test(value) ? `"${value}"` : value} `,
  }));
}
