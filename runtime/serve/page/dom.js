/** An element: attributes that are functions listen to events, null and false are left out, true is empty. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value != null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  fill(made, children);
  return made;
}

/** Appends nodes and texts; neighbouring texts become one node, and there may be any number of them. */
export function fill(parent, children) {
  let text = "";
  for (const child of children) {
    if (typeof child === "string") {
      text += child;
      continue;
    }
    if (text) parent.append(text);
    text = "";
    if (child) parent.append(child);
  }
  if (text) parent.append(text);
}

export const byId = (id) => document.getElementById(id);

export const count = (n) => n.toLocaleString("en");

export const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
