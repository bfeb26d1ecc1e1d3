// A keyed renderer. `h()` describes elements, `render()` makes the document agree with the description and touches only
// what differs. Strings become text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "circle", "rect", "g", "title"]);
const PROPERTIES = new Set(["value", "checked", "indeterminate", "disabled", "open", "selected", "hidden"]);

/**
 * Describe an element. `props` holds attributes, `on<event>` listeners, `key` (identity among siblings) and `ref` (called
 * once with the new element). False, null and undefined children keep their place, so what follows them stays the same.
 * @param {string} tag
 * @param {Record<string, any> | null} [props]
 * @param {...any} children
 */
export function h(tag, props, ...children) {
  return { tag, props: props ?? {}, key: props?.key, children: flat(children, []), node: null };
}

/** Make the content of `container` what `tree` describes. */
export function render(tree, container) {
  const before = container.rendered ?? [];
  if (!container.rendered) container.replaceChildren();
  container.rendered = reconcile(container, before, flat([tree], []));
}

function flat(children, into) {
  for (const child of children) {
    if (Array.isArray(child)) flat(child, into);
    else if (child === false || child === null || child === undefined || child === "") into.push(text(""));
    else if (typeof child === "object") into.push(child);
    else into.push(text(String(child)));
  }
  return into;
}

function text(value) {
  return { tag: "#text", value, key: undefined, node: null };
}

function reconcile(parent, before, after) {
  const keyed = new Map();
  const unkeyed = [];
  for (const old of before) {
    if (old.key === undefined) unkeyed.push(old);
    else keyed.set(old.key, old);
  }
  let place = 0;
  const kept = new Set();
  const matched = after.map((vnode) => {
    const old = vnode.key === undefined ? unkeyed[place++] : keyed.get(vnode.key);
    if (!old || old.tag !== vnode.tag || kept.has(old)) return null;
    kept.add(old);
    return old;
  });
  // What leaves goes first: then whatever stays is already in order, and is not moved.
  for (const old of before) if (!kept.has(old)) old.node.remove();
  let cursor = parent.firstChild;
  after.forEach((vnode, index) => {
    const old = matched[index];
    vnode.node = old ? update(old, vnode) : create(vnode);
    if (vnode.node === cursor) cursor = cursor.nextSibling;
    else parent.insertBefore(vnode.node, cursor);
  });
  return after;
}

function create(vnode) {
  if (vnode.tag === "#text") return document.createTextNode(vnode.value);
  const element = SVG_TAGS.has(vnode.tag) ? document.createElementNS(SVG, vnode.tag) : document.createElement(vnode.tag);
  vnode.children = reconcile(element, [], vnode.children);
  // After the children: a select takes a value only where it has the option.
  for (const [name, value] of Object.entries(vnode.props)) assign(element, name, undefined, value);
  vnode.props.ref?.(element);
  return element;
}

function update(old, vnode) {
  const element = old.node;
  if (vnode.tag === "#text") {
    if (old.value !== vnode.value) element.data = vnode.value;
    return element;
  }
  vnode.children = reconcile(element, old.children, vnode.children);
  for (const name of Object.keys(old.props)) if (!(name in vnode.props)) assign(element, name, old.props[name], undefined);
  for (const [name, value] of Object.entries(vnode.props)) assign(element, name, old.props[name], value);
  return element;
}

function assign(element, name, before, value) {
  if (name === "key" || name === "ref") return;
  if (name.startsWith("on")) {
    // One listener that looks the present function up: a new closure at each rendering costs nothing.
    const type = name.slice(2);
    element.listeners ??= {};
    if (!(type in element.listeners)) element.addEventListener(type, dispatch);
    element.listeners[type] = value;
  } else if (name === "style") {
    // Through the object model: the policy forbids style attributes.
    for (const [property, setting] of Object.entries(value ?? {})) element.style.setProperty(property, setting);
  } else if (PROPERTIES.has(name) && name in element) {
    // Compared with the element, not with the last rendering: a person may have typed since.
    const wanted = value ?? (name === "value" ? "" : false);
    if (element[name] !== wanted) element[name] = wanted;
  } else if (before !== value) {
    if (value === undefined || value === null || value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

function dispatch(event) {
  event.currentTarget.listeners[event.type]?.(event);
}
