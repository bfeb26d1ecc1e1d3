// Where a line's time went, as one bar: until a worker took it, and its phases from then until its answer was stored.
import { duration, percent, plural } from "../format.js";
import { h } from "./render.js";

// Names of `timing`, the bar's fill, the key's, and the word for it.
const WAITED = ["waited_ms", "w", "q", "waited"];
const RAN = ["ran_ms", "g", "g", "ran"];
const PHASES = [
  ["engine_ms", "s", "s", "engine"],
  ["grammar_ms", "s", "s", "grammar"],
  ["prefill_ms", "p", "p", "prefill"],
  ["decode_ms", "g", "g", "decode"],
  ["preempted_ms", "o", "o", "preempted"],
  ["write_ms", "w", "q", "write"],
];

/**
 * @param {any} line as `/v1/jobs/{id}/lines/{line}` gives it, once it came
 * @param {any} tokens its token counts
 */
export function phases(line, tokens, { href = null, label }) {
  const link = href && h("a", { class: "btn sm", href }, "Open line");
  const timing = line?.timing ?? {};
  const kinds = [WAITED, ...((timing.engine_ms ?? null) === null ? [RAN] : PHASES)];
  const shown = kinds.map(([name, fill, key, text]) => ({ name, fill, key, text, ms: timing[name] ?? 0 })).filter((phase) => phase.ms > 0);
  if (!shown.length) return h("div", { class: "phases" }, h("span", null, line ? "It was not timed." : " "), link);
  const all = shown.reduce((sum, phase) => sum + phase.ms, 0);
  let x = 0;
  const rects = shown.map((phase) => {
    const width = (100 * phase.ms) / all;
    const rect = h("rect", { key: phase.name, class: phase.fill, x: `${x}%`, width: `${width}%`, height: "100%" });
    x += width;
    return rect;
  });
  const generated = tokens.completion_tokens && plural(tokens.completion_tokens, "token");
  const cached = tokens.cached_tokens && `${percent(tokens.cached_tokens, tokens.prompt_tokens)} of the prompt cached`;
  const notes = { ran_ms: [generated, cached], prefill_ms: [cached], decode_ms: [generated], preempted_ms: [timing.preemptions > 1 && `${timing.preemptions} times`] };
  const note = (phase) => (notes[phase.name] ?? []).filter(Boolean).join(", ");
  return h(
    "div",
    { class: "phases" },
    h("svg", { preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${shown.map((phase) => `${phase.text} ${duration(phase.ms / 1000)}`).join(", ")}` }, rects),
    h("ul", null, shown.map((phase) => h("li", { key: phase.name }, h("i", { class: `key ${phase.key}` }), phase.text, " ", h("b", null, duration(phase.ms / 1000)), " ", note(phase)))),
    link,
  );
}
