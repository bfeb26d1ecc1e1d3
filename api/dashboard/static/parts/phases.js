// Where a line's time went, as one bar: in the worker's queue, prefill, decode, preempted, written.
import { duration, percent, plural } from "../format.js";
import { h } from "./render.js";

const KINDS = [
  ["wait", "w", "q", "waited"],
  ["engine", "w", "q", "in the engine's queue"],
  ["grammar", "o", "o", "grammar"],
  ["prefill", "p", "p", "prefill"],
  ["decode", "g", "g", "decode"],
  ["preempted", "o", "o", "preempted"],
  ["write", "s", "s", "written"],
];

/**
 * @param {any} detail the line as `/v1/jobs/{id}/lines/{line}` gives it, once it came; its `timing` is in milliseconds
 * @param {any} row its token counts
 */
export function phases(detail, row, { href = null, label }) {
  const link = href && h("a", { class: "btn sm", href }, "Open line");
  const timing = detail?.timing;
  if (!timing) return h("div", { class: "phases" }, h("span", null, detail ? (row.took_ms ? `Took ${duration(row.took_ms / 1000)}; its phases were not measured.` : "Its phases were not measured.") : " "), link);
  const shown = KINDS.map(([name, fill, key, text]) => ({ name, fill, key, text, ms: timing[name] ?? 0 })).filter((phase) => phase.ms > 0);
  const all = shown.reduce((sum, phase) => sum + phase.ms, 0) || 1;
  let x = 0;
  const rects = shown.map((phase) => {
    const width = (100 * phase.ms) / all;
    const rect = h("rect", { key: phase.name, class: phase.fill, x: `${x}%`, width: `${width}%`, height: "100%" });
    x += width;
    return rect;
  });
  const note = (phase) => {
    if (phase.name === "prefill" && row.cached_tokens) return `${percent(row.cached_tokens, row.prompt_tokens)} cached`;
    if (phase.name === "decode" && row.completion_tokens) return plural(row.completion_tokens, "token");
    if (phase.name === "preempted" && timing.preemptions) return `${timing.preemptions} times`;
    return "";
  };
  return h(
    "div",
    { class: "phases" },
    h("svg", { preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${shown.map((phase) => `${phase.text} ${duration(phase.ms / 1000)}`).join(", ")}` }, rects),
    h("ul", null, shown.map((phase) => h("li", { key: phase.name }, h("i", { class: `key ${phase.key}` }), phase.text, " ", h("b", null, duration(phase.ms / 1000)), " ", note(phase)))),
    link,
  );
}
