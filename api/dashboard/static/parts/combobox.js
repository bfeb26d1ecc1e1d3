// The search field: a combobox (ARIA 1.2) that completes fields and values, and underlines fields that do not exist.
import { icon } from "../icons.js";
import { nearest, parse, suggest, typedAt } from "../search.js";
import { changed } from "../store.js";
import { h } from "./render.js";

const PAUSE = 120; // milliseconds after the last key

export class SearchField {
  /**
   * @param {(query: string) => void} search called with Enter, and where a suggestion completed a term
   */
  constructor(search) {
    this.search = search;
    this.text = "";
    this.options = [];
    this.chosen = -1;
    this.isOpen = false;
    this.timer = null;
    this.input = null;
    this.place = null; // what is being typed, as the options have it
  }

  focus() {
    this.input?.focus();
    this.input?.select();
  }

  view(placeholder) {
    return h(
      "div",
      { class: "search", role: "search", onfocusout: (event) => !event.currentTarget.contains(event.relatedTarget) && this.close() },
      icon("find"),
      h(
        "div",
        { class: "text-in" },
        h("div", { class: "marks", "aria-hidden": "true" }, this.marks()),
        h("input", {
          id: "search", type: "text", role: "combobox", autocomplete: "off", autocapitalize: "off", spellcheck: "false",
          "aria-label": "Search jobs", "aria-expanded": String(this.isOpen), "aria-controls": "suggestions", "aria-autocomplete": "list",
          "aria-activedescendant": this.isOpen && this.chosen >= 0 ? `suggestion-${this.chosen}` : null,
          placeholder, value: this.text, ref: (element) => (this.input = element),
          oninput: (event) => this.typed(event.target.value), onkeydown: (event) => this.key(event), onclick: () => this.ask(),
        }),
      ),
      h("kbd", { "aria-hidden": "true" }, "/"),
      h(
        "ul",
        { class: "popup", id: "suggestions", role: "listbox", "aria-label": "Suggestions", hidden: !this.isOpen },
        this.options.map((option, place) =>
          h(
            "li",
            {
              key: option.text, id: `suggestion-${place}`, role: "option", "aria-selected": String(place === this.chosen),
              onmousedown: (event) => { event.preventDefault(); this.take(option); },
            },
            option.text,
            h("span", null, option.note),
          ),
        ),
      ),
    );
  }

  marks() {
    let from = 0;
    const parts = [];
    for (const term of parse(this.text)) {
      parts.push(this.text.slice(from, term.start), term.known ? term.text : h("u", null, term.text));
      from = term.end;
    }
    return parts;
  }

  /** The first field that does not exist, with the one that was probably meant. */
  wrong() {
    const term = parse(this.text).find((candidate) => !candidate.known);
    return term && { field: term.field, meant: nearest(term.field) };
  }

  replaceField(from, to) {
    this.text = this.text.replace(`${from}:`, `${to}:`);
    this.search(this.text);
  }

  typed(text) {
    this.text = text;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), PAUSE);
    if (text === "") this.search("");
    changed();
  }

  ask() {
    clearTimeout(this.timer);
    this.timer = null;
    if (document.activeElement !== this.input) return;
    const before = this.place;
    const place = (this.place = typedAt(this.text, this.input.selectionStart));
    const found = suggest(place);
    if (Array.isArray(found)) return void this.show(found);
    // Until the service answers, those that still fit stay.
    this.show(before?.field === place.field ? this.options.filter((option) => option.text.toLowerCase().startsWith(place.prefix.toLowerCase())) : []);
    found.then((options) => this.place === place && document.activeElement === this.input && this.show(options), () => null);
  }

  show(options) {
    const chosen = this.options[this.chosen]?.text;
    this.options = options;
    this.chosen = options.findIndex((option) => option.text === chosen);
    this.isOpen = options.length > 0;
    changed();
  }

  take(option) {
    clearTimeout(this.timer);
    this.timer = null;
    // Keys typed since the options were found belong to the term that the option replaces.
    this.place = typedAt(this.text, this.input.selectionStart);
    this.text = this.text.slice(0, this.place.start) + option.insert + this.text.slice(this.place.end);
    const { start } = this.place;
    const caret = start + option.insert.length;
    // At once, not with the next frame: the next key may come before it.
    this.input.value = this.text;
    this.input.setSelectionRange(caret, caret);
    this.close();
    if (option.insert.endsWith(" ")) this.search(this.text.trim());
    else this.ask();
  }

  close() {
    this.place = null;
    this.isOpen = false;
    this.options = [];
    this.chosen = -1;
    changed();
  }

  key(event) {
    const { key } = event;
    if (key === "ArrowDown" || key === "ArrowUp") {
      event.preventDefault();
      if (!this.isOpen) return void this.ask();
      // What was typed last counts now: found later, it would take the choice back.
      if (this.timer) this.ask();
      if (this.options.length === 0) return undefined;
      const step = key === "ArrowDown" ? 1 : -1;
      this.chosen = (this.chosen + step + this.options.length + (this.chosen < 0 && step < 0 ? 1 : 0)) % this.options.length;
      changed();
    } else if (key === "Tab" && this.isOpen && this.chosen >= 0) {
      event.preventDefault();
      this.take(this.options[this.chosen]);
    } else if (key === "Enter") {
      event.preventDefault();
      if (this.isOpen && this.chosen >= 0) return this.take(this.options[this.chosen]);
      this.close();
      this.search(this.text.trim());
    } else if (key === "Escape") {
      event.stopPropagation();
      if (this.isOpen) this.close();
      else this.input.blur();
    }
    return undefined;
  }
}
