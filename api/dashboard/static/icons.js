// Line icons of 16 units, drawn here; state is a shape first and a colour second.
import { h } from "./parts/render.js";

const PATHS = {
  jobs: "M2.5 4h11M2.5 8h11M2.5 12h7",
  queue: "M2.5 3.5v9M6.2 5.5v7M9.8 7.5v5M13.5 10v2.5",
  fleet: "M3.4 2.7h9.2a1.2 1.2 0 0 1 1.2 1.2v2a1.2 1.2 0 0 1-1.2 1.2H3.4a1.2 1.2 0 0 1-1.2-1.2v-2a1.2 1.2 0 0 1 1.2-1.2ZM3.4 8.9h9.2a1.2 1.2 0 0 1 1.2 1.2v2a1.2 1.2 0 0 1-1.2 1.2H3.4a1.2 1.2 0 0 1-1.2-1.2v-2a1.2 1.2 0 0 1 1.2-1.2ZM4.9 4.9h.1M4.9 11.1h.1",
  plus: "M8 3v10M3 8h10",
  key: "M8.3 10.6a2.9 2.9 0 1 1-5.8 0 2.9 2.9 0 0 1 5.8 0ZM7.6 8.4l5.6-5.6M11 5l2 2",
  hook: "M6 2.8a2.6 2.6 0 0 1 3.8 3.4L8 9.2M6.3 11.4a1.9 1.9 0 1 1-3.8 0 1.9 1.9 0 0 1 3.8 0ZM13.7 11.4a1.9 1.9 0 1 1-3.8 0 1.9 1.9 0 0 1 3.8 0ZM6.3 11.4h3.6M4.9 9.6l2-3.4",
  gear: "M10.2 8a2.2 2.2 0 1 1-4.4 0 2.2 2.2 0 0 1 4.4 0ZM8 1.9v2M8 12.1v2M1.9 8h2M12.1 8h2M3.7 3.7l1.4 1.4M10.9 10.9l1.4 1.4M3.7 12.3l1.4-1.4M10.9 5.1l1.4-1.4",
  more: "M3.5 8h.1M8 8h.1M12.5 8h.1",
  arrow: "M2.5 8h11M9.5 4l4 4-4 4",
  back: "M13.5 8h-11M6.5 4l-4 4 4 4",
  bolt: "M9 1.8 3.4 9H8l-1 5.2L12.6 7H8z",
  find: "M11.6 7a4.6 4.6 0 1 1-9.2 0 4.6 4.6 0 0 1 9.2 0ZM10.5 10.5l3.3 3.3",
  copy: "M7.1 5.5h4.8a1.6 1.6 0 0 1 1.6 1.6v4.8a1.6 1.6 0 0 1-1.6 1.6H7.1a1.6 1.6 0 0 1-1.6-1.6V7.1a1.6 1.6 0 0 1 1.6-1.6ZM10.5 5.5V4A1.5 1.5 0 0 0 9 2.5H4A1.5 1.5 0 0 0 2.5 4v5A1.5 1.5 0 0 0 4 10.5h1.5",
  file: "M4 2.2h5l3 3v8.6H4zM9 2.2v3h3",
  check: "m3 8.5 3.2 3.2L13 5",
};
const RING = "M14.1 8A6.1 6.1 0 1 1 1.9 8a6.1 6.1 0 0 1 12.2 0Z";

export function icon(name, extra) {
  return frame(h("path", { d: PATHS[name], "stroke-linecap": "round", "stroke-width": name === "more" ? 2.4 : null }), extra);
}

function frame(...children) {
  return h(
    "svg",
    { class: "icon", viewBox: "0 0 16 16", fill: "none", stroke: "currentColor", "stroke-width": 1.75, "aria-hidden": "true" },
    children,
  );
}

const ring = (dashes) => h("path", { d: RING, "stroke-dasharray": dashes });
const disc = () => h("circle", { cx: 8, cy: 8, r: 7, fill: "currentColor", stroke: "none" });

export const clockIcon = () => frame(ring(), h("path", { d: "M8 4.5V8l2.3 1.6" }));
export const failIcon = () => frame(disc(), h("path", { d: "m5.6 5.6 4.8 4.8m0-4.8-4.8 4.8", stroke: "var(--panel)" }));

/** The shape of a state; `part` is how full a running job's pie is, 0 to 1. */
export function stateIcon(state, part = 0) {
  switch (state) {
    case "running":
      return frame(
        ring(),
        h("circle", {
          cx: 8, cy: 8, r: 1.9, "stroke-width": 3.8, pathLength: 100,
          "stroke-dasharray": `${(part * 100).toFixed(1)} 100`, transform: "rotate(-90 8 8)",
        }),
      );
    case "waiting":
      return frame(ring("2.4 2.4"));
    case "paused":
      return frame(ring(), h("path", { d: "M6.4 5.8v4.4M9.6 5.8v4.4" }));
    case "completed":
      return frame(disc(), h("path", { d: "m5 8.3 2.1 2.1L11 6.2", stroke: "var(--panel)" }));
    case "failures":
      return frame(ring(), h("path", { d: "M8 4.6v4M8 11h.1", "stroke-linecap": "round" }));
    case "cancelled":
    case "cancelling":
      return frame(ring(), h("path", { d: "m4.2 11.8 7.6-7.6" }));
    case "expired":
      return clockIcon();
    case "lost":
      return frame(h("path", { d: "M8 2 14 8l-6 6-6-6z" }));
    default:
      return frame(ring());
  }
}

export function logo() {
  return h(
    "svg",
    { class: "logo", viewBox: "0 0 20 20", "aria-hidden": "true" },
    h("rect", { x: 1, y: 1, width: 18, height: 18, rx: 5, fill: "var(--ink)" }),
    h("path", { d: "M5 13.6h10M5 10h10M5 6.4h5.6", stroke: "var(--bg)", "stroke-width": 1.9, "stroke-linecap": "round" }),
  );
}
