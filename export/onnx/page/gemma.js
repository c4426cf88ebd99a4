// Gemma as `bezel export --target portable` writes it, on any of onnxruntime's packages: text in, text out.
// What is fed and why: docs/onnx.md.

const CHUNK = 128; // tokens that are fed at once at most
const SPARE = 512; // slots that a ring has beyond what its window needs: it can go back so far from its furthest
const FIRST = 1024; // slots of a global layer to begin with
const REPLACEMENT = "\ufffd"; // what the bytes of a half-written letter decode to

/** The chat or the text does not fit into the model's context. */
export class ContextFull extends Error {}

export class Gemma {
  #ids = []; // whose keys and values the caches hold
  #furthest = 0; // how many there ever were: what was taken back is in the rings still
  #caches = {};

  /** `about` is what the export says of the model; `session` runs its graph. */
  constructor(ort, session, tokenizer, about) {
    Object.assign(this, { ort, session, tokenizer, about });
  }

  /** The ids of a chat whose answer is due, or of a text to go on with where the model does not chat. */
  prompt(messages) {
    const { bos, turns } = this.about;
    const encode = (text) => this.tokenizer.encode(text).ids;
    if (!turns) return [bos, ...encode(messages.map(({ content }) => content).join(""))];
    const [start, end] = turns;
    const told = messages.map(({ role, content }) => [role === "assistant" ? "model" : role, content.trim()]);
    if (told[0][0] === "system") {
      const [[, system], [role, text]] = told.splice(0, 2);
      told.unshift([role, system ? `${system}\n\n${text}` : text]);
    }
    const ids = told.flatMap(([role, text]) => [start, ...encode(`${role}\n${text}`), end, ...encode("\n")]);
    return [bos, ...ids, start, ...encode("model\n")];
  }

  /**
   * An answer to `prompt` as it comes: objects with `text`, the last with `ended` and how many tokens were `cached`
   * and `written`. `read` is called when the prompt was read. Throws ContextFull.
   */
  async *answer(prompt, settings, signal, read = () => {}) {
    const { context, stops } = this.about;
    if (prompt.length >= context) throw new ContextFull();
    const cached = await this.#rewind(prompt);
    let logits;
    for (let at = cached; at < prompt.length; at += CHUNK) {
      await taskOfItsOwn();
      if (signal.aborted) return;
      logits = await this.#feed(prompt.slice(at, at + CHUNK));
    }
    read();
    const choose = sampler({ ...this.about.sampling, ...settings });
    const limit = Math.min(settings.max_tokens ?? Infinity, context - prompt.length);
    const written = [];
    let shown = "";
    let ended = "length";
    while (written.length < limit && !signal.aborted) {
      const next = choose(logits);
      if (stops.includes(next)) {
        ended = "stop";
        break;
      }
      written.push(next);
      const text = this.tokenizer.decode(written, { skip_special_tokens: true });
      if (!text.endsWith(REPLACEMENT)) {
        yield { text: text.slice(shown.length) };
        shown = text;
      }
      if (written.length < limit) logits = await this.#feed([next]);
      await taskOfItsOwn();
    }
    yield { text: "", ended, cached, written: written.length };
  }

  /** Keeps what the caches have of `prompt`, and says how much; all but its last token at most. */
  async #rewind(prompt) {
    let same = 0;
    while (same < prompt.length - 1 && prompt[same] === this.#ids[same]) same++;
    if (!Object.keys(this.#caches).length || this.#furthest - same > SPARE) {
      this.#forget();
      same = 0;
    }
    this.#ids.length = same;
    await this.#makeRoom(prompt.length);
    return same;
  }

  #forget() {
    for (const cache of Object.values(this.#caches)) cache.dispose();
    this.#caches = {};
    this.#ids = [];
    this.#furthest = 0;
  }

  /** Global layers have slots for `length` positions and more; at first, all get their zeros. */
  async #makeRoom(length) {
    const { layers, window, context } = this.about;
    for (let i = 0; i < layers.length; i++) {
      const { global, heads, size } = layers[i];
      for (const name of [`${i}.key`, `${i}.value`]) {
        const old = this.#caches[name];
        const had = old?.dims[2] ?? 0;
        if (old && (!global || had >= length)) continue;
        let slots = window + CHUNK + SPARE;
        if (global) for (slots = FIRST; slots < length; slots *= 2);
        if (global) slots = Math.min(slots, context);
        const rows = new Float32Array(heads * slots * size);
        if (old) {
          const held = await old.getData(true);
          for (let h = 0; h < heads; h++) rows.set(held.subarray(h * had * size, (h + 1) * had * size), h * slots * size);
        }
        this.#caches[name] = new this.ort.Tensor("float32", rows, [1, heads, slots, size]);
      }
    }
  }

  /** The logits behind `ids`, which come after what the caches hold. */
  async #feed(ids) {
    const start = this.#ids.length;
    await this.#makeRoom(start + ids.length);
    const numbers = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [values.length]);
    const feeds = { input_ids: numbers(ids), positions: numbers(ids.map((_, i) => start + i)) };
    feeds.wanted = numbers([ids.length - 1]);
    for (const name in this.#caches) feeds[`past.${name}`] = this.#caches[name];
    const found = await this.session.run(feeds);
    for (const name in this.#caches) {
      this.#caches[name].dispose();
      this.#caches[name] = found[`present.${name}`];
    }
    this.#ids.push(...ids);
    this.#furthest = Math.max(this.#furthest, this.#ids.length);
    return found.logits.getData();
  }
}

/** Lets messages in: with one thread a session's promises are kept within one task, which would last a whole answer. */
function taskOfItsOwn() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

/** Chooses a token by its logits: temperature, then top_k, top_p and min_p, as bezel has them. */
export function sampler({ temperature = 1, top_k = 64, top_p = 0.95, min_p = 0, seed }) {
  const random = generator(seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
  return (logits) => {
    if (!temperature) return likeliest(logits, 1)[0];
    const ids = likeliest(logits, top_k || logits.length);
    const weights = ids.map((id) => Math.exp((logits[id] - logits[ids[0]]) / temperature));
    const total = weights.reduce((a, b) => a + b);
    let kept = 0;
    for (let sum = 0; kept < ids.length && (!kept || sum < top_p * total) && weights[kept] >= min_p; kept++) {
      sum += weights[kept];
    }
    let left = random() * weights.slice(0, kept).reduce((a, b) => a + b);
    for (let i = 0; i < kept - 1; i++) if ((left -= weights[i]) < 0) return ids[i];
    return ids[kept - 1];
  };
}

/** The ids of the `count` largest, the largest first; of equal ones the first. */
function likeliest(logits, count) {
  if (count >= logits.length) return Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  const found = [];
  for (let i = 0; i < logits.length; i++) {
    if (found.length === count && logits[i] <= logits[found[count - 1]]) continue;
    let at = found.length;
    while (at && logits[found[at - 1]] < logits[i]) at--;
    found.splice(at, 0, i);
    found.length = Math.min(found.length, count);
  }
  return found;
}

/** Numbers from 0 to 1 by a seed: splitmix32. */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let x = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
    return ((x ^ (x >>> 15)) >>> 0) / 2 ** 32;
  };
}

/** A tokenizer by which no text becomes a control token: those come by id only. */
export function plainTokenizer(Tokenizer, json, config) {
  const added = json.added_tokens.filter(({ special }) => !special);
  return new Tokenizer({ ...json, added_tokens: added, post_processor: null }, config);
}
