// Where a line's time went, as one bar: until a worker took it, and from then until its answer was stored.
import { duration, percent, plural } from "../format.js";
import { h } from "./render.js";

const KINDS = [
  ["waited_ms", "w", "q", "waited"],
  ["ran_ms", "g", "g", "ran"],
];

/**
 * @param {any} line as `/v1/jobs/{id}/lines/{line}` gives it, once it came
 * @param {any} tokens its token counts
 */
export function phases(line, tokens, { href = null, label }) {
  const link = href && h("a", { class: "btn sm", href }, "Open line");
  const shown = KINDS.map(([name, fill, key, text]) => ({ name, fill, key, text, ms: line?.timing?.[name] ?? 0 })).filter((phase) => phase.ms > 0);
  if (!shown.length) return h("div", { class: "phases" }, h("span", null, line ? "It was not timed." : " "), link);
  const all = shown.reduce((sum, phase) => sum + phase.ms, 0);
  let x = 0;
  const rects = shown.map((phase) => {
    const width = (100 * phase.ms) / all;
    const rect = h("rect", { key: phase.name, class: phase.fill, x: `${x}%`, width: `${width}%`, height: "100%" });
    x += width;
    return rect;
  });
  const note = (phase) => (phase.name !== "ran_ms" ? "" : [tokens.completion_tokens && plural(tokens.completion_tokens, "token"), tokens.cached_tokens && `${percent(tokens.cached_tokens, tokens.prompt_tokens)} of the prompt cached`].filter(Boolean).join(", "));
  return h(
    "div",
    { class: "phases" },
    h("svg", { preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${shown.map((phase) => `${phase.text} ${duration(phase.ms / 1000)}`).join(", ")}` }, rects),
    h("ul", null, shown.map((phase) => h("li", { key: phase.name }, h("i", { class: `key ${phase.key}` }), phase.text, " ", h("b", null, duration(phase.ms / 1000)), " ", note(phase)))),
    link,
  );
}
