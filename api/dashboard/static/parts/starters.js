// What to type where there is nothing yet: exact commands with this service's address.
import { get, post } from "../api.js";
import { go } from "../router.js";
import { canWrite, changed, state, toast } from "../store.js";
import { command } from "./dialog.js";
import { h } from "./render.js";

export const curlOf = (body, address = location.origin) =>
  `curl ${address}/v1/jobs -H "Authorization: Bearer $PAGEMILL_API_KEY" -H 'Content-Type: application/json' -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;

export const pythonOf = (body, address = location.origin) =>
  `import httpx, os\nkey = os.environ["PAGEMILL_API_KEY"]\nhttpx.post("${address}/v1/jobs", headers={"Authorization": f"Bearer {key}"}, json=${pythonLiteral(body)})`;

function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonLiteral(item)}`).join(", ")}}`;
  return JSON.stringify(value);
}

/** Models with how many workers serve them now; read once and kept. */
export async function loadModels() {
  const { data } = await get("/v1/models");
  state.models = data;
  changed();
  return data;
}

let asked = false;

/** A first job by hand, by Python, or by a click. */
export function starters() {
  if (!asked) {
    asked = true;
    loadModels().catch(() => (asked = false));
  }
  const model = (state.models.find((one) => one.live_workers > 0) ?? state.models[0])?.id;
  if (!model && asked) return h("div", { class: "steps" }, h("p", null, "No worker has come up yet. This starts one:"), command("pagemill worker --model PATH_OR_ID", "the command"));
  const body = { model, prompts: ["17 + 58 ="] };
  const send = async () => {
    try {
      const job = await post("/v1/jobs", { ...body, name: "first sample", params: { temperature: 0, max_tokens: 8 } });
      go(`/jobs/${job.id}`);
    } catch (failure) {
      toast(failure.message, { bad: true });
    }
  };
  return h(
    "div",
    { class: "steps" },
    h("p", { class: "muted" }, "Hand in prompts from a shell …"),
    command(curlOf(body), "the curl command"),
    h("p", { class: "muted" }, "… from Python …"),
    command(pythonOf(body), "the Python code"),
    canWrite() && h("p", { class: "btns" }, h("button", { class: "btn main", type: "button", onclick: send }, "Send this sample"), h("a", { class: "btn", href: "/new" }, "Paste or drop prompts")),
  );
}
