// Questions, menus and messages above the page. A dialog gives the focus back to where it came from.
import { changed, dismiss, state, toast } from "../store.js";
import { h, render } from "./render.js";

/**
 * Ask; resolves to what `onaccept` of the form returns, or to null where it was dismissed.
 * @param {{title: string, body: any, accept?: string, danger?: boolean, type?: string, values?: () => any, locked?: boolean}} what
 */
export function ask({ title, body, accept = "OK", danger = false, values = () => true, locked = false }) {
  return new Promise((resolve) => {
    const before = document.activeElement;
    const dialog = document.createElement("dialog");
    dialog.setAttribute("aria-labelledby", "dialog-title");
    document.body.append(dialog);
    let result = null;
    const submit = (event) => {
      event.preventDefault();
      const given = values(dialog);
      if (given === undefined) return;
      result = given;
      dialog.close();
    };
    render(
      h(
        "form",
        { onsubmit: submit },
        h("h2", { id: "dialog-title" }, title),
        body,
        h(
          "div",
          { class: "btns" },
          !locked && h("button", { class: "btn", type: "button", onclick: () => dialog.close() }, "Back"),
          h("button", { class: `btn main ${danger ? "danger" : ""}`, type: "submit" }, accept),
        ),
      ),
      dialog,
    );
    dialog.addEventListener("cancel", (event) => locked && event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      before?.focus?.();
      resolve(result);
    });
    dialog.showModal();
  });
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https the clipboard is only reached through a selection.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`Copied ${what}`);
}

export const copyButton = (text, what, label = "Copy") =>
  h("button", { class: "btn sm", type: "button", "aria-label": `Copy ${what}`, onclick: () => copy(text, what) }, label);

/** A command with its copy button. */
export function command(text, what) {
  return h("div", { class: "cmd" }, h("pre", { tabindex: 0, "aria-label": what }, text), copyButton(text, what));
}

/** A button with a list of actions below it: [label, action or address]. */
export function menu(label, content, entries, holder) {
  const close = () => {
    holder.menu = null;
    changed();
  };
  return h(
    "div",
    {
      class: "menu",
      onfocusout: (event) => !event.currentTarget.contains(event.relatedTarget) && holder.menu === label && close(),
      onkeydown: (event) => {
        if (event.key !== "Escape" || holder.menu !== label) return;
        event.stopPropagation();
        event.currentTarget.querySelector("button").focus();
        close();
      },
    },
    h(
      "button",
      {
        class: "btn more", type: "button", "aria-label": label, "aria-expanded": String(holder.menu === label),
        onclick: () => {
          holder.menu = holder.menu === label ? null : label;
          changed();
        },
      },
      content,
    ),
    holder.menu === label &&
      h(
        "ul",
        null,
        entries.filter(Boolean).map(([text, act, danger]) =>
          h(
            "li",
            { key: text },
            typeof act === "string"
              ? h("a", { href: act, download: act.startsWith("/v1/") ? "" : null, onclick: close }, text)
              : h("button", { type: "button", class: danger ? "fail" : "", onclick: () => { close(); act(); } }, text),
          ),
        ),
      ),
  );
}

export function toasts() {
  return h(
    "div",
    { class: "toasts" },
    state.toasts.map((entry) =>
      h(
        "div",
        { key: entry.id, class: entry.bad ? "toast bad" : "toast", role: entry.bad ? "alert" : null },
        h("span", null, entry.text),
        entry.undo && h("button", { class: "btn sm", type: "button", onclick: () => { dismiss(entry); entry.undo(); } }, entry.undoText),
        h("button", { class: "btn sm", type: "button", "aria-label": "Close this message", onclick: () => dismiss(entry) }, "×"),
      ),
    ),
  );
}

/** What went wrong, in the panel concerned. */
export function problem(error, again) {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", { class: "fail" }, error.message),
    error.requestId &&
      h("p", { class: "small muted" }, "Request ", h("code", null, error.requestId), " ", copyButton(error.requestId, "request id")),
    again && h("button", { class: "btn sm", type: "button", onclick: again }, "Try again"),
  );
}

/** Grey bars where rows will be. */
export const greyRows = (rows, columns) =>
  Array.from({ length: rows }, (_, place) =>
    h("tr", { key: `grey-${place}`, "aria-hidden": "true" }, Array.from({ length: columns }, () => h("td", null, h("span", { class: "grey" })))),
  );
