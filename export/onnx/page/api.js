// What the page asks of the model, which runs in a worker of the page.

import { byId, element } from "./dom.js";
import { Failure } from "./failure.js";

/** There is no server that might ask for one. */
export const key = { get: () => null, set() {}, forget() {} };

/** The model: name, the tokens of its context, and whether it can be talked to. */
export const models = [];

let worker;
let ready; // a promise: the model is loaded
let hear = () => {}; // what the worker says of an answer
let asked = false; // whether anything was

export async function askModels() {
  if (worker) return;
  await isolated();
  const response = await fetch(new URL("./about.json", import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Failure("gone", "The files of this page cannot be read. Is its server still running?");
  const about = await response.json();
  models.splice(0, models.length, { name: about.name, context: about.context, chats: true });
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  ready = loading(about);
  ready.catch(() => {}); // whoever asks is told
}

/**
 * Waits for the service worker that keeps all files, so that the page works without a network, and that lets threads
 * share memory; a page that it did not serve is loaded once more. Where there can be none, there is one thread.
 */
async function isolated() {
  if (!navigator.serviceWorker) return;
  try {
    const registration = await navigator.serviceWorker.register(new URL("../service-worker.js", import.meta.url));
    await navigator.serviceWorker.ready;
    await newer(registration);
  } catch {
    return; // a browser that keeps nothing
  }
  if (!crossOriginIsolated && !sessionStorage.getItem("loaded-again")) {
    sessionStorage.setItem("loaded-again", "yes");
    location.reload();
    await new Promise(() => {});
  }
}

/**
 * Asks the server for a newer page, before anything large is loaded: until that is done, the service worker that keeps
 * this one lets no other take over. When one has, `renewed` is called.
 */
async function newer(registration) {
  await atMost(2000, registration.update()).catch(() => {}); // without a network, what is kept is what there is
  const next = registration.installing ?? registration.waiting;
  if (!next) return;
  const givenUp = (done) => next.addEventListener("statechange", () => next.state === "redundant" && done());
  await atMost(10_000, new Promise(givenUp));
}

const atMost = (ms, promise) => Promise.race([promise, new Promise((done) => setTimeout(done, ms))]);

/** The files are of a newer export now: the page is loaded once more, unless somebody has begun to use it. */
function renewed() {
  const load = () => location.reload();
  if (!asked && !byId("box").value) return load();
  const act = element("button", { type: "button", click: load }, "Load it");
  byId("notice").before(element("p", { class: "soft" }, "There is a newer version of this page. ", act));
}

navigator.serviceWorker?.addEventListener("message", renewed);

function loading(about) {
  const bar = element("progress", { max: 1, value: 0, "aria-label": "Loading the model" });
  const words = element("p", { id: "loading", class: "soft" }, bar, " ", element("span", {}));
  byId("notice").before(words);
  const say = (text) => (words.lastChild.textContent = text);
  const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
  say("Loading the model …");
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => fail(event.message);
    worker.onmessage = ({ data }) => {
      if (data.loaded) {
        bar.value = data.loaded / data.total;
        say(`Loading the model: ${megabytes(data.loaded)} of ${megabytes(data.total)} MB`);
      } else if (data.starting) {
        bar.removeAttribute("value");
        say("Starting the model …");
      } else if (data.failed) {
        fail(data.words);
      } else if (data.ready) {
        words.remove();
        byId("keys").append(` · ${data.ready}`);
        worker.onmessage = (event) => hear(event.data);
        worker.onerror = (event) => hear({ failed: "broken", words: event.message });
        resolve();
      }
    };
    worker.postMessage({ about });

    function fail(reason) {
      worker.onmessage = null; // files that still come have no say in it
      worker.terminate();
      words.replaceChildren(`The model cannot be loaded: ${reason}`);
      reject(new Failure("gone", `The model cannot be loaded: ${reason}`));
    }
  });
}

export const modelOf = (name) => models.find((model) => model.name === name);

/** An answer as it comes: objects with `text`, with `ended` ("stop" or "length"), with `usage` and `timings`. */
export async function* chat({ messages, model, ...settings }, signal) {
  asked = true;
  await ready;
  const heard = [];
  let wake = () => {};
  hear = (data) => {
    heard.push(data);
    wake();
  };
  const stop = () => worker.postMessage({ stop: true });
  signal.addEventListener("abort", stop);
  try {
    worker.postMessage({ messages, settings });
    for (;;) {
      while (!heard.length) await new Promise((resolve) => (wake = resolve));
      const { done, failed, words, text, ended, prompt, cached, written, rate } = heard.shift();
      if (failed === "long") throw new Failure("long", "This conversation does not fit into the model’s context.");
      if (failed) throw new Failure("gone", `The model broke: ${words}.`);
      if (done) break;
      const usage = ended && {
        prompt_tokens: prompt,
        prompt_tokens_details: { cached_tokens: cached },
        completion_tokens: written,
      };
      if (!signal.aborted) {
        yield { text, ended, usage, timings: { predicted_per_second: rate }, model: models[0].name };
      }
    }
    signal.throwIfAborted();
  } finally {
    signal.removeEventListener("abort", stop);
  }
}
