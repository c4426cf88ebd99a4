// How messages look.
import { count, element, plural } from "./dom.js";
import { Live, render } from "./markdown.js";

const unseen = (name, text) => element(name, { class: "unseen" }, text);

/** A message; `acts` are its buttons: [words, what to do, whether it changes the conversation]. */
export function turn(message, acts, several) {
  const isUser = message.role === "user";
  const pictures = (message.pictures ?? []).map((src, i) => element("img", { src, alt: `Picture ${i + 1}` }));
  const text = isUser ? [...pictures, message.text] : render(message.text);
  return element(
    "article",
    { class: `turn ${message.role}` },
    unseen("h2", isUser ? "You" : "Answer"),
    element("div", { class: "text" }, ...text),
    foot(message, acts, several),
  );
}

/** What is below a message: its buttons and, of an answer, its figures; the model's name where there are `several`. */
export function foot(message, acts, several) {
  const buttons = acts.map(([words, act, changes]) =>
    element("button", { type: "button", class: changes ? "quiet changes" : "quiet", click: act }, words),
  );
  const told = message.role === "user" ? [] : figures(message, several);
  return element("div", { class: "foot" }, ...told, element("span", { class: "acts" }, ...buttons));
}

function figures({ model, ended, figures: found }, several) {
  const told = [];
  if (several && model) told.push(model);
  if (ended === "stopped") told.push("stopped");
  else if (ended !== "stop" && ended !== "length") told.push("broken off");
  else if (ended === "length" && found) {
    const isFull = found.prompt + found.written >= found.context;
    told.push(isFull ? "cut off: the context is full" : `cut off after ${plural(found.written, "token")}, as set`);
  }
  if (found?.rate) told.push(`${found.rate < 100 ? found.rate.toFixed(1) : count(Math.round(found.rate))} tokens/s`);
  const parts = told.map((words) => element("span", {}, words));
  if (found) {
    parts.push(fullness(found.prompt + found.written, found.context));
    const { cached, prompt } = found;
    const read = `${plural(prompt, "token")} read`;
    parts.push(element("span", {}, cached ? `${count(cached)} of ${read} before` : read));
  }
  return parts;
}

function fullness(used, context) {
  if (!context) return element("span", {}, `context ${count(used)}`);
  const share = Math.min(1, used / context); // the last token of all is written, not read
  const bar = element("i");
  bar.style.width = `${100 * share}%`;
  const gauge = element("span", { class: share > 0.9 ? "gauge full" : "gauge", "aria-hidden": "true" }, bar);
  return element("span", {}, gauge, `context ${count(Math.min(used, context))} of ${count(context)}`);
}

/** An answer that is being written. */
export class Writing {
  #text = element("div", { class: "text" });
  #live = new Live(this.#text);
  #waiting = element("span");
  #clock;
  #due = 0;
  #cost = 0;

  /** `since`: when it was asked for, by the page's clock; `drawn` is called when something has been shown. */
  constructor(text, since, drawn) {
    this.node = element(
      "article",
      { class: "turn assistant", "aria-busy": "true" },
      unseen("h2", "Answer"),
      this.#text,
      element("div", { class: "foot" }, this.#waiting),
    );
    this.drawn = drawn;
    const tick = () => {
      this.#waiting.textContent = `Reading… ${Math.round((performance.now() - since) / 1000)} s`;
    };
    this.#clock = setInterval(tick, 1000);
    this.#waiting.textContent = "Reading…";
    if (text) this.push(text);
  }

  push(text) {
    clearInterval(this.#clock);
    this.#waiting.textContent = "Writing…";
    this.#live.push(text);
    // However long the text is, a tenth of the time goes into showing it.
    this.#due ||= setTimeout(() => this.#draw(), Math.max(30, 9 * this.#cost));
  }

  #draw() {
    const began = performance.now();
    this.#due = 0;
    this.#live.draw();
    this.drawn();
    this.#cost = performance.now() - began;
  }

  /** It is complete: shows all of it, and `below`. */
  end(below) {
    this.close();
    this.#live.end();
    this.node.removeAttribute("aria-busy");
    this.node.lastChild.replaceWith(below);
    this.drawn();
  }

  /** Nobody looks at it any more. */
  close() {
    clearInterval(this.#clock);
    clearTimeout(this.#due);
  }
}
