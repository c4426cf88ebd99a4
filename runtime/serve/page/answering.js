// An answer on its way.
import { chat, modelOf } from "./api.js";

const SAVE_MS = 1000; // how often it is kept meanwhile

export class Answering {
  reply = { role: "assistant", text: "" };
  since = performance.now();
  writing = null; // where it is shown, if it is
  done = null; // a promise: all is kept
  #stopping = new AbortController();
  #keep;

  /** `keep` keeps a conversation. */
  constructor(conversation, keep) {
    this.conversation = conversation;
    this.#keep = keep;
  }

  stop() {
    this.#stopping.abort();
  }

  /** Reads the answer until it ends or is stopped. Throws what went wrong. */
  async run() {
    const { conversation, reply } = this;
    let saved = performance.now();
    try {
      for await (const part of chat(request(conversation), this.#stopping.signal)) {
        reply.text += part.text;
        if (part.text) this.writing?.push(part.text);
        reply.model ??= part.model;
        if (part.usage) reply.figures = figuresOf(part);
        reply.ended ??= part.ended;
        if (performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          const soFar = reply.text ? [{ ...reply }] : [];
          this.#keep({ ...conversation, messages: [...conversation.messages, ...soFar] });
        }
      }
    } catch (error) {
      if (!this.#stopping.signal.aborted) throw error;
      reply.ended = "stopped";
    }
  }
}

/** What is asked of the server: of the settings only those that there are. */
function request({ settings, messages }) {
  const { system, model, ...sampling } = settings;
  const told = messages.map(({ role, text, pictures }) => ({ role, content: pictures ? parts(pictures, text) : text }));
  if (system) told.unshift({ role: "system", content: system });
  return { messages: told, ...sampling, ...(modelOf(model) && { model }) };
}

function parts(pictures, text) {
  const shown = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...shown, { type: "text", text }];
}

function figuresOf({ usage, timings, model }) {
  const context = modelOf(model)?.context;
  return {
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details.cached_tokens,
    written: usage.completion_tokens,
    ...(timings.predicted_per_second && { rate: timings.predicted_per_second }),
    ...(context && { context }),
  };
}
