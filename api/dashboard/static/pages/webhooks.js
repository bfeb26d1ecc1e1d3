// What became of each webhook, attempt by attempt, with another try; and the secret that they are signed with.
import { address, get, post } from "../api.js";
import { plural, shortId, time, visible } from "../format.js";
import { copyButton, greyRows, problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { canWrite, changed, toast } from "../store.js";

const TONES = { delivered: "ok", pending: "wait", given_up: "fail" };

export const deliveriesOf = async (jobId) => (await get(address("/v1/webhooks/deliveries", { job: jobId, limit: 50 }))).data;

async function replay(delivery, again) {
  try {
    await post(`/v1/webhooks/deliveries/${delivery.id}/replay`);
    toast("It is sent again");
    await again();
  } catch (failure) {
    toast(failure.message, { bad: true });
  }
}

/** One delivery with its attempts: time, status, milliseconds, the beginning of the answer. */
function entry(delivery, again) {
  const when = delivery.status === "pending" && delivery.next_attempt_at ? `next at ${time(delivery.next_attempt_at, { seconds: true })}` : delivery.delivered_at ? time(delivery.delivered_at, { seconds: true }) : "";
  return h(
    "li",
    { key: delivery.id },
    h("p", null, h("b", { class: TONES[delivery.status] }, delivery.status.replace("_", " ")), ` · ${delivery.event.type}`, delivery.last_status_code && ` · ${delivery.last_status_code}`, ` · ${plural(delivery.num_attempts, "attempt")}`),
    h("p", { class: "muted clip", title: delivery.url }, delivery.url),
    delivery.attempts.length > 0 &&
      h(
        "details",
        { class: "small" },
        h("summary", { class: "muted" }, "attempts"),
        h("ol", { class: "steps" }, delivery.attempts.map((attempt) => h("li", { key: attempt.number }, `${time(attempt.at, { seconds: true })} · ${attempt.status_code ?? "no answer"} · ${attempt.milliseconds} ms`, attempt.error && h("span", { class: "fail" }, ` · ${attempt.error}`), attempt.answer && h("code", { class: "text" }, ` ${visible(attempt.answer)}`)))),
      ),
    h("p", { class: "btns" }, h("span", { class: "tiny faint" }, when), canWrite() && h("button", { class: "btn sm", type: "button", onclick: () => replay(delivery, again) }, "Replay")),
  );
}

/** The webhooks of one job. */
export function webhookPanel(deliveries, again) {
  if (!deliveries?.length) return null;
  return h("section", { class: "panel", "aria-label": "Webhooks" }, h("header", null, h("h2", null, "Webhooks")), h("ul", { class: "body steps small" }, deliveries.map((delivery) => entry(delivery, again))));
}

export function open() {
  const page = { secret: null, deliveries: null, problem: null, isShown: false };

  async function refresh() {
    page.secret ??= (await get("/v1/webhook_secret")).secret;
    page.deliveries = (await get(address("/v1/webhooks/deliveries", { limit: 50 }))).data;
    page.problem = null;
    changed();
  }
  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });

  return {
    title: () => "Webhooks",
    load,
    refresh,
    view: () => [
      h("div", { class: "head" }, h("h1", null, "Webhooks")),
      page.problem && h("div", { class: "panel" }, problem(page.problem, load)),
      h(
        "section",
        { class: "panel", "aria-label": "Secret" },
        h("header", null, h("h2", null, "Secret of jobs' own webhooks")),
        h("div", { class: "body steps" }, h("p", { class: "muted" }, "They are signed with it, as Standard Webhooks says."), h("p", { class: "btns" }, h("code", null, page.secret ? (page.isShown ? page.secret : `${page.secret.slice(0, 10)}…`) : " "), page.secret && h("button", { class: "btn sm", type: "button", "aria-pressed": String(page.isShown), onclick: () => { page.isShown = !page.isShown; changed(); } }, page.isShown ? "Hide" : "Show"), page.secret && copyButton(page.secret, "the secret"))),
      ),
      h(
        "section",
        { class: "panel", "aria-label": "Deliveries" },
        h("header", null, h("h2", null, "Deliveries"), h("span", { class: "muted small" }, "the newest 50")),
        page.deliveries
          ? h("ul", { class: "body steps" }, page.deliveries.length ? page.deliveries.map((delivery) => [h("li", { key: `job-${delivery.id}`, class: "small" }, delivery.job_id && h("a", { class: "link", href: `/jobs/${delivery.job_id}` }, shortId(delivery.job_id))), entry(delivery, load)]) : h("li", { class: "muted" }, "None yet. A job names its own: ", h("code", null, '"webhook": {"url": "https://…"}')))
          : h("table", null, h("tbody", null, greyRows(3, 2))),
      ),
    ],
  };
}
