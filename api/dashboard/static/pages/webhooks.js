// Where events go, what became of each, attempt by attempt, with another try; and the secrets they are signed with.
import { address, get, post, remove } from "../api.js";
import { plural, shortId, time, visible } from "../format.js";
import { ask, copyButton, greyRows, menu, problem } from "../parts/dialog.js";
import { icon } from "../icons.js";
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

/** Show a secret that is shown only now. */
const showSecret = (secret) =>
  ask({ title: "This secret is shown only now", accept: "I have copied it", locked: true, body: [h("p", { class: "muted" }, "The receiver verifies signatures with it, as Standard Webhooks says."), h("div", { class: "cmd" }, h("pre", { tabindex: 0, "aria-label": "The secret" }, secret), copyButton(secret, "the secret"))] });

/** Ask for an endpoint's name, address and events; null where it was left. */
function askEndpoint(types, now = { name: "", url: "", event_types: types }) {
  const wanted = { ...now, event_types: new Set(now.event_types) };
  const field = (name, label, extra) => h("label", { class: "field" }, h("span", null, label), h("input", { class: "input", value: wanted[name], required: true, oninput: (event) => (wanted[name] = event.target.value), ...extra }));
  return ask({
    title: now.id ? `Change ${now.name}` : "New endpoint",
    accept: "Save",
    body: [
      field("name", "Name, for people", { maxlength: 128, autofocus: true }),
      field("url", "Address", { type: "url", maxlength: 2048, placeholder: "https://example.com/hook" }),
      h("fieldset", { class: "field" }, h("legend", null, "Events"), types.map((type) => h("label", { key: type, class: "check" }, h("input", { type: "checkbox", checked: wanted.event_types.has(type), onchange: (event) => wanted.event_types[event.target.checked ? "add" : "delete"](type) }), ` ${type}`))),
    ],
    values: () => ({ name: wanted.name, url: wanted.url, event_types: [...wanted.event_types] }),
  });
}

/** The endpoints, and what can be done to each. */
function endpointsPanel(page, load) {
  const path = (endpoint) => `/v1/webhook_endpoints/${endpoint.id}`;
  const run = (action) => async () => {
    try {
      await action();
      await load();
    } catch (failure) {
      toast(failure.message, { bad: true });
    }
  };
  const create = run(async () => {
    const given = await askEndpoint(page.types);
    if (given) await showSecret((await post("/v1/webhook_endpoints", given)).signing_secret);
  });
  const actions = (endpoint) => [
    ["Send a test", run(async () => toast(`${endpoint.name} answered ${(await post(`${path(endpoint)}/test`, { event_type: endpoint.event_types[0] })).status_code}`))],
    ["Change…", run(async () => {
      const given = await askEndpoint(page.types, endpoint);
      if (given) await post(path(endpoint), given);
    })],
    ["New secret…", run(async () => {
      const sure = await ask({ title: `A new secret for ${endpoint.name}?`, body: h("p", null, "Deliveries are signed with both for 24 hours, then with the new one alone."), accept: "Make it" });
      if (sure) await showSecret((await post(`${path(endpoint)}/rotate_secret`, { keep_old_secret_active_for_24_hours: true })).signing_secret);
    })],
    endpoint.disabled_at && ["Enable", run(() => post(path(endpoint), { name: endpoint.name }))],
    ["Remove…", run(async () => {
      const sure = await ask({ title: `Remove ${endpoint.name}?`, body: h("p", null, "Its deliveries go with it. This cannot be taken back."), accept: "Remove", danger: true });
      if (sure) await remove(path(endpoint));
    }), true],
  ];
  return h(
    "section",
    { class: "panel", "aria-label": "Endpoints" },
    h("header", null, h("h2", null, "Endpoints"), h("span", { class: "muted small" }, "get the events of every job and batch"), h("span", { class: "sp" }), canWrite() && page.types && h("button", { class: "btn sm", type: "button", onclick: create }, "New endpoint…")),
    !page.endpoints
      ? h("table", null, h("tbody", null, greyRows(2, 2)))
      : !page.endpoints.length
        ? h("p", { class: "body muted small" }, "None yet.")
        : h(
            "table",
            { class: "stack" },
            h("caption", { class: "sr" }, "Endpoints"),
            h("thead", null, h("tr", null, ["Name", "Address", "Events", "Secret"].map((text) => h("th", null, text)), h("th", null, h("span", { class: "sr" }, "Actions")))),
            h("tbody", null, page.endpoints.map((endpoint) =>
              h(
                "tr",
                { key: endpoint.id },
                h("td", null, h("bdi", null, endpoint.name), endpoint.disabled_at && h("span", { class: "fail small" }, ` off since ${time(endpoint.disabled_at)}`)),
                h("td", { class: "clip", title: endpoint.url }, endpoint.url),
                h("td", { class: "small muted", title: endpoint.event_types.join(", ") }, endpoint.event_types.length === page.types.length ? "all" : endpoint.event_types.join(", ")),
                h("td", { class: "small muted" }, h("code", null, endpoint.signing_secret_hint)),
                h("td", { class: "num wide" }, canWrite() && menu(`Actions of ${endpoint.name}`, icon("more"), actions(endpoint), page)),
              ),
            )),
          ),
  );
}

export function open() {
  const page = { secret: null, deliveries: null, endpoints: null, types: null, problem: null, isShown: false, menu: null };

  async function refresh() {
    page.secret ??= (await get("/v1/webhook_secret")).secret;
    page.types ??= (await get("/v1/webhook_event_types")).data;
    const [deliveries, endpoints] = await Promise.all([get(address("/v1/webhooks/deliveries", { limit: 50 })), get(address("/v1/webhook_endpoints", { limit: 100 }))]);
    Object.assign(page, { deliveries: deliveries.data, endpoints: endpoints.data });
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
      endpointsPanel(page, load),
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
