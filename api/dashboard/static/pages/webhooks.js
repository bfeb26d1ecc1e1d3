// Where the service reports jobs' ends: the secret they are signed with, and what became of a job's deliveries.
import { get, post } from "../api.js";
import { plural, time } from "../format.js";
import { command, copyButton, problem } from "../parts/dialog.js";
import { h } from "../parts/render.js";
import { canWrite, changed, toast } from "../store.js";

const SHAPES = { delivered: "ok", pending: "wait", given_up: "fail" };
const WORDS = { delivered: "delivered", pending: "tried again", given_up: "given up" };

function outcome(delivery) {
  const tone = SHAPES[delivery.status] ?? "muted";
  const said = delivery.last_status ? `${delivery.last_status}` : (delivery.last_error ?? "");
  return [h("b", { class: tone }, WORDS[delivery.status] ?? delivery.status), said && ` · ${said}`, delivery.attempts > 1 && ` · ${plural(delivery.attempts, "attempt")}`];
}

async function replay(delivery, again) {
  try {
    await post(`/v1/deliveries/${delivery.id}/replay`);
    toast("It is sent again");
    await again();
  } catch (failure) {
    toast(failure.message, { bad: true });
  }
}

/** The webhooks of one job. */
export function webhookPanel(job, again) {
  const deliveries = job.deliveries ?? [];
  if (!deliveries.length) return null;
  return h(
    "section",
    { class: "panel", "aria-label": "Webhooks" },
    h("header", null, h("h2", null, "Webhooks")),
    h("ul", { class: "body steps small" }, deliveries.map((delivery) => h("li", { key: delivery.id }, h("div", null, delivery.type, " · ", outcome(delivery)), h("div", { class: "muted clip", title: delivery.url }, delivery.url), delivery.last_error && h("div", { class: "tiny faint" }, delivery.last_error), h("div", { class: "btns" }, h("span", { class: "tiny faint" }, delivery.next_attempt_at && delivery.status === "pending" ? `next at ${time(delivery.next_attempt_at, { seconds: true })}` : time(delivery.delivered_at ?? delivery.created_at, { seconds: true })), canWrite() && delivery.status !== "delivered" && h("button", { class: "btn sm", type: "button", onclick: () => replay(delivery, again) }, "Replay"))))),
  );
}

export function open() {
  const page = { secret: null, problem: null };

  async function refresh() {
    page.secret ??= await get("/v1/webhook_secret");
    changed();
  }

  const load = () => refresh().catch((failure) => { page.problem = failure; changed(); });
  let shown = false;

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
        h("header", null, h("h2", null, "Secret")),
        h("div", { class: "body steps" }, h("p", { class: "muted" }, "Every delivery is signed with it, as Standard Webhooks says."), h("p", { class: "btns" }, h("code", null, page.secret ? (shown ? page.secret.secret : `${page.secret.secret.slice(0, 10)}…`) : " "), page.secret && h("button", { class: "btn sm", type: "button", "aria-pressed": String(shown), onclick: () => { shown = !shown; changed(); } }, shown ? "Hide" : "Show"), page.secret && copyButton(page.secret.secret, "the secret"))),
      ),
      h("section", { class: "panel empty" }, h("p", null, "A job names its own webhook, and its page shows what became of each delivery."), command(`curl ${location.origin}/v1/jobs -H "Authorization: Bearer $PAGEMILL_API_KEY" -H 'Content-Type: application/json' -d '{"model": "demo", "prompts": ["17 + 58 ="], "webhook": {"url": "https://example.com/hook"}}'`, "the curl command"))
    ],
  };
}
