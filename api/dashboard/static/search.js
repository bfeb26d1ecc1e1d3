// The language of the search field: `["-"] (field ":" value {"," value} | word)`, joined by AND, commas by OR.
import { address, get } from "./api.js";
import { plural } from "./format.js";

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
  ["code", "of a failed line"],
  ["tenant", "for operators"],
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

/**
 * Suggestions as {text, note, insert}: fields at once, or a promise of a field's values, the most frequent first.
 * @returns {object[] | Promise<object[]>}
 */
export function suggest({ field, prefix }) {
  if (field === null) {
    return FIELDS.filter(([name]) => name.startsWith(prefix.toLowerCase())).slice(0, 9).map(([name, note]) => ({
      text: name.endsWith(".") ? `${name}…` : `${name}:`, note, insert: name.endsWith(".") ? name : `${name}:`,
    }));
  }
  return get(address("/v1/suggest", { field, prefix })).then(({ data }) =>
    data.map(({ value, jobs }) => ({ text: value, note: plural(jobs, "job"), insert: `${/[\s",]/.test(value) ? `"${value}"` : value} ` })),
  );
}
