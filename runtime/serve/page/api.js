// What the page asks the server.

import { Failure } from "./failure.js";
import { ofThisBrowser, ofThisTab } from "./small.js";

const GONE = "The server does not answer. Is bezel serve still running? What you wrote is kept.";

export const key = {
  get: () => ofThisTab.get("key") ?? ofThisBrowser.get("key"),
  /** For as long as this tab is open, or `always`. */
  set(text, always) {
    key.forget();
    (always ? ofThisBrowser : ofThisTab).set("key", text);
  },
  forget() {
    ofThisTab.forget("key");
    ofThisBrowser.forget("key");
  },
};

async function ask(path, body, signal) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Failure("gone", GONE);
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw failureOf(response.status, told.error ?? {});
}

function failureOf(status, { message, code }) {
  const words = sentence(typeof message === "string" && message ? message : `the server answered ${status}`);
  if (status === 401) {
    const wrong = key.get() ? "The server did not take this key." : "This server asks for a key.";
    return new Failure("key", wrong);
  }
  if (code === "context_length_exceeded") return new Failure("long", words);
  return status === 503 ? new Failure("busy", `The server is busy: ${message}.`) : new Failure("refused", words);
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The models as they were last told: name, the tokens of its context, whether it chats, and whether it sees. */
export const models = [];

const modelFrom = (name, { n_ctx, chat, sees }) => ({ name, context: n_ctx, chats: chat, sees });

export async function askModels() {
  const { data } = await (await ask("/v1/models")).json();
  models.splice(0, models.length, ...data.map(({ id, meta }) => modelFrom(id, meta)));
}

export const modelOf = (name) => models.find((model) => model.name === name);

/** An answer as it comes: objects with `text`, with `ended` ("stop" or "length"), with `usage` and `timings`. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("/v1/chat/completions", asked, signal);
  let complete = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const { error, choices, usage, timings, model } = JSON.parse(data);
      if (error) throw failureOf(error.code, { ...error, code: null });
      const choice = choices[0];
      yield { text: choice?.delta.content ?? "", ended: choice?.finish_reason, usage, timings, model };
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
  }
  if (!complete) throw new Failure("gone", "The server went away in the middle of the answer.");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
