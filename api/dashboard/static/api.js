// Requests to `/v1`, with the session's cookie. Every failure is an ApiError that says what the service said.

export class ApiError extends Error {
  /** @param {number} status 0 where no answer came */
  constructor(status, message, { code = null, requestId = null, line = null, body = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, line, body });
  }
}

const TIMEOUT = 20000; // milliseconds

async function send(method, path, { body, json, headers = {}, signal } = {}) {
  const own = { accept: "application/json", ...headers };
  // The service takes a write with a cookie only from its own page; another site cannot set this header.
  if (method !== "GET") own["x-pagemill-page"] = "1";
  if (json !== undefined) {
    own["content-type"] = "application/json";
    body = JSON.stringify(json);
  }
  const overdue = AbortSignal.timeout(TIMEOUT);
  let response;
  try {
    response = await fetch(path, {
      method, body, headers: own, credentials: "same-origin", cache: "no-store",
      signal: signal ? AbortSignal.any([signal, overdue]) : overdue,
    });
  } catch (failure) {
    if (signal?.aborted) throw failure;
    throw new ApiError(0, failure.name === "TimeoutError" ? "The service does not answer." : "The service cannot be reached.");
  }
  if (response.ok) return response;
  const requestId = response.headers.get("x-request-id");
  const answer = await response.json().catch(() => ({}));
  const error = answer.error ?? {};
  const message = error.message ?? `The service answered ${response.status}.`;
  throw new ApiError(response.status, message, { code: error.code, requestId, line: error.line, body: answer });
}

const asJson = async (promise) => {
  const response = await promise;
  return response.status === 204 ? null : response.json();
};

export const get = (path, options) => asJson(send("GET", path, options));
export const post = (path, json, options) => asJson(send("POST", path, { ...options, json: json ?? {} }));
export const patch = (path, json) => asJson(send("PATCH", path, { json }));
export const remove = (path) => asJson(send("DELETE", path));
export const raw = (path, options) => send("GET", path, options);

/** A path with a query; null, undefined and "" are left out, lists stand several times. */
export function address(path, query = {}) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") parts.append(name, one);
    }
  }
  const text = parts.toString();
  return text ? `${path}?${text}` : path;
}

/** Lines of NDJSON as objects. */
export async function ndjson(path, options) {
  const response = await raw(path, { headers: { accept: "application/x-ndjson" }, ...options });
  const text = await response.text();
  return { lines: text.split("\n").filter(Boolean).map((line) => JSON.parse(line)), headers: response.headers };
}
