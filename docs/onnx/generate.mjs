// Greedy text from a folder of `bezel export --target portable`: node generate.mjs FOLDER PROMPT TOKENS
// npm install --ignore-scripts onnxruntime-node @huggingface/tokenizers
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const CONTEXT = 4096, CHUNK = 128; // positions that fit, and tokens that are fed at once at most

const [folder, prompt, count] = process.argv.slice(2);
const read = (name) => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"));
// Without the control tokens, which would be found in the text that somebody types.
const json = read("tokenizer.json");
const added = json.added_tokens.filter(({ special }) => !special);
const tokenizer = new Tokenizer({ ...json, added_tokens: added, post_processor: null }, read("tokenizer_config.json"));
const { sliding_window: window = 0, bos_token_id: begin, eos_token_id: ends } = read("config.json");
const session = await ort.InferenceSession.create(`${folder}/model.onnx`);

// A cache is float32 (1, heads, slots, head_dim), all zeros. Position p is kept in slot p mod slots: local layers need
// slots for a window and a chunk, the others for every position.
const slots = { "slots.global": CONTEXT, "slots.local": window + CHUNK - 1 };
let caches = {};
for (const { name, shape } of session.inputMetadata) {
  if (!name.startsWith("past.")) continue;
  const sizes = shape.map((size) => slots[size] ?? size);
  caches[name] = new ort.Tensor("float32", new Float32Array(sizes.reduce((a, b) => a * b)), sizes);
}

const numbers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [values.length]);

/** The logits of the last of `ids`, which have the positions `start`, `start` + 1, … */
async function feed(ids, start) {
  const found = await session.run({
    input_ids: numbers(ids),
    positions: numbers(ids.map((_, i) => start + i)),
    wanted: numbers([ids.length - 1]),
    ...caches,
  });
  for (const name in caches) caches[name] = found[name.replace("past", "present")];
  return found.logits.data;
}

const ids = [begin, ...tokenizer.encode(prompt).ids];
if (ids.length + Number(count) > CONTEXT) throw new Error(`${ids.length} tokens and ${count} more do not fit into ${CONTEXT}`);
let logits;
for (let start = 0; start < ids.length; start += CHUNK) logits = await feed(ids.slice(start, start + CHUNK), start);
for (let left = Number(count); left > 0; left--) {
  ids.push(logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0));
  if (ends.includes(ids.at(-1))) break;
  logits = await feed(ids.slice(-1), ids.length - 1);
}
console.log(JSON.stringify(ids));
console.log(tokenizer.decode(ids.filter((id) => id !== begin && !ends.includes(id))));
