// One curve over time as SVG, with marks for what happened and the same as numbers below.
import { count, short, time } from "../format.js";
import { h } from "./render.js";

const WIDTH = 600;

/**
 * @param {{points: {at: number, value: number}[], marks?: {at: number, text: string, bad?: boolean}[], height?: number,
 *   label: string, unit: string, now?: number | null}} what
 */
export function chart({ points, marks = [], height = 168, label, unit, isRunning = false }) {
  if (points.length < 2) {
    return h(
      "div",
      { class: "chart" },
      h("div", { class: "y" }),
      h("div", { class: "plot" }, h("svg", { "aria-hidden": "true" }), h("p", { class: "none" }, isRunning ? "The first minute is not over yet." : "It took less than two minutes: too short for a curve.")),
      h("div", { class: "x" }),
    );
  }
  const from = points[0].at;
  const span = points.at(-1).at - from;
  const top = ceiling(Math.max(...points.map((point) => point.value)));
  const x = (at) => ((at - from) / span) * WIDTH;
  const y = (value) => height - (value / top) * (height - 1);
  const curve = `M${points.map((point) => `${x(point.at).toFixed(1)} ${y(point.value).toFixed(1)}`).join(" L")}`;
  const shown = marks.filter((mark) => mark.at >= from && mark.at <= from + span);
  const ticks = [0, 1 / 3, 2 / 3, 1].map((part) => from + span * part);
  return [
    h(
      "div",
      { class: "chart" },
      h("div", { class: "y", "aria-hidden": "true" }, [top, top / 2, 0].map((value) => h("span", null, short(value)))),
      h(
        "div",
        { class: "plot" },
        h(
          "svg",
          { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": describe(label, points, shown) },
          h("path", { class: "grid", d: `M0 .5H${WIDTH}M0 ${height / 2}H${WIDTH}M0 ${height - 0.5}H${WIDTH}` }),
          h("path", { class: "area", d: `${curve} L${WIDTH} ${height} L0 ${height}Z` }),
          h("path", { class: "line", d: curve }),
          shown.map((mark, place) => h("path", { key: `mark-${place}`, class: mark.bad ? "mark fail" : "mark", d: `M${x(mark.at).toFixed(1)} 0V${height}` })),
        ),
        notes(shown, x),
      ),
      h("div", { class: "x", "aria-hidden": "true" }, ticks.map((at, place) => h("span", null, place === 3 && isRunning ? "now" : time(at)))),
    ),
    numbers(points, unit),
  ];
}

/** Words at the marks; one that would lie on the word before it is left to the timeline. */
function notes(marks, x) {
  let free = -1;
  return marks.map((mark, place) => {
    const at = x(mark.at) / WIDTH;
    if (at < free) return null;
    free = at + 0.18;
    const side = at > 0.8 ? " left" : "";
    return h("span", { key: `note-${place}`, class: `note${mark.bad ? " fail" : ""}${side}`, style: { left: `${(at * 100).toFixed(2)}%` } }, mark.text);
  });
}

function numbers(points, unit) {
  return h(
    "details",
    { class: "numbers" },
    h("summary", null, "as numbers"),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "group", "aria-label": "Numbers of the chart" },
      h(
        "table",
        null,
        h("thead", null, h("tr", null, h("th", null, "Time"), h("th", { class: "num" }, unit))),
        h("tbody", null, points.map((point) => h("tr", { key: point.at }, h("td", null, time(point.at, { seconds: true })), h("td", { class: "num" }, short(point.value))))),
      ),
    ),
  );
}

function describe(label, points, marks) {
  const values = points.map((point) => point.value);
  const what = marks.map((mark) => `${mark.text} at ${time(mark.at)}`).join(", ");
  return `${label} since ${time(points[0].at)}: now ${short(values.at(-1))}, at most ${short(Math.max(...values))}, least ${short(Math.min(...values))}${what ? `; ${what}` : ""}; ${count(points.length)} values`;
}

/** The next of 1, 1.5, 2, 3, 5, 7 times a power of ten. */
export function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7, 10].find((step) => step * power >= value) * power;
}
