// Addresses to pages and back. The address holds the whole view: copied, it shows the same.

const ROUTES = [
  ["/", "jobs"],
  ["/login", "login"],
  ["/jobs/:id", "job"],
  ["/jobs/:id/lines/:line", "line"],
  ["/queue", "queue"],
  ["/fleet", "fleet"],
  ["/fleet/:id", "worker"],
  ["/new", "new"],
  ["/keys", "keys"],
  ["/webhooks", "webhooks"],
  ["/settings", "settings"],
];

/** @returns {{name: string, params: Record<string, string>}} */
export function match(pathname) {
  const parts = pathname.replace(/\/$/, "").split("/");
  for (const [pattern, name] of ROUTES) {
    const wanted = pattern.replace(/\/$/, "").split("/");
    if (wanted.length !== parts.length) continue;
    const params = {};
    const fits = wanted.every((part, place) => {
      if (!part.startsWith(":")) return part === parts[place];
      params[part.slice(1)] = decodeURIComponent(parts[place]);
      return parts[place] !== "";
    });
    if (fits) return { name, params };
  }
  return { name: "missing", params: {} };
}

let arrive = () => {};

/** Call `listener` at each change of the page, and follow links inside the page without loading it anew. */
export function follow(listener) {
  arrive = listener;
  addEventListener("popstate", () => listener());
  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    const link = event.target.closest?.("a[href]");
    if (!link || link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
    if (match(link.pathname).name === "missing") return;
    event.preventDefault();
    go(link.pathname + link.search + link.hash);
  });
}

export function go(href) {
  if (href === location.pathname + location.search) return;
  history.pushState(null, "", href);
  scrollTo(0, 0);
  arrive();
}

/** Change the query of the present page; an empty value removes it. The page itself stays. */
export function setQuery(changes, { push = false } = {}) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  const text = query.toString();
  history[push ? "pushState" : "replaceState"](null, "", location.pathname + (text ? `?${text}` : ""));
}

export const query = (name) => new URLSearchParams(location.search).get(name) ?? "";
