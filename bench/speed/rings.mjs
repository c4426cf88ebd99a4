// What child.py is, for onnxruntime-node on the target `portable`: node rings.mjs onnxruntime-node OPTIONS
// Fed as docs/onnx/generate.mjs does; the option `modules` is the folder that has `node_modules`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const CHUNK = 128; // tokens at once
const { model, context, threads, modules } = JSON.parse(process.argv[3]);
const require = createRequire(`${modules}/`);
const ort = require("onnxruntime-node");

let session, vocabulary, shapes, caches, held;

async function open() {
  const config = JSON.parse(readFileSync(`${model}/config.json`, "utf8"));
  vocabulary = config.vocab_size;
  session = await ort.InferenceSession.create(`${model}/model.onnx`, { intraOpNumThreads: threads });
  const slots = { "slots.global": context, "slots.local": (config.sliding_window ?? 0) + CHUNK - 1 };
  const past = session.inputMetadata.filter(({ name }) => name.startsWith("past."));
  shapes = past.map(({ name, shape }) => [name, shape.map((size) => slots[size] ?? size)]);
  reset();
}

function reset() {
  const zeros = (sizes) => new ort.Tensor("float32", new Float32Array(sizes.reduce((a, b) => a * b)), sizes);
  caches = Object.fromEntries(shapes.map(([name, sizes]) => [name, zeros(sizes)]));
  held = 0;
}

const numbers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [values.length]);

async function feed(ids) {
  const found = await session.run({
    input_ids: numbers(ids),
    positions: numbers(ids.map((_, i) => held + i)),
    wanted: numbers([ids.length - 1]),
    ...caches,
  });
  for (const name in caches) caches[name] = found[name.replace("past", "present")];
  held += ids.length;
}

async function answer(what, n) {
  const ids = Array.from({ length: n }, (_, i) => (2 + 7919 * i) % vocabulary);
  const start = performance.now();
  if (what === "prefill") for (let i = 0; i < n; i += CHUNK) await feed(ids.slice(i, i + CHUNK));
  else if (what === "decode") for (const id of ids) await feed([id]);
  else if (what === "reset") reset();
  else if (what === "memory") return { peak_bytes: peak() };
  else if (what === "about") return { version: require("onnxruntime-node/package.json").version, kv: "f32" };
  const seconds = (performance.now() - start) / 1000;
  if (what === "decode") held -= n;
  return { seconds };
}

/** The most that this process ever held, which only Linux tells. */
function peak() {
  try {
    return 1024 * Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]);
  } catch {
    return null;
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const [what, n] = line.split(" ");
  let found;
  try {
    const start = performance.now();
    if (!session) await open();
    const opened = { seconds: (performance.now() - start) / 1000 };
    found = what === "open" ? opened : await answer(what, Number(n));
  } catch (error) {
    found = { error: String(error) };
  }
  console.log(JSON.stringify(found));
}
