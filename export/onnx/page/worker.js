// Where the model runs, beside the page: one answer at a time.

import { ContextFull, Gemma, plainTokenizer } from "./gemma.js";

const MODEL = new URL("../model/", import.meta.url);
const ORT = new URL("../onnxruntime/", import.meta.url);
const SHARES = 20; // how often the page is told what was loaded

let gemma;
let stopping = new AbortController();

self.onmessage = async ({ data }) => {
  if (data.stop) stopping.abort();
  else if (data.about) tell(load(data.about));
  else if (data.messages) tell(answer(data));
};

/** What goes wrong is told to the page. */
async function tell(work) {
  try {
    await work;
  } catch (error) {
    self.postMessage({ failed: error instanceof ContextFull ? "long" : "broken", words: String(error.message ?? error) });
  }
}

async function load(about) {
  const gpu = await adapter();
  const ort = await import(new URL(gpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs", ORT));
  ort.env.wasm.wasmPaths = ORT.href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads(navigator.hardwareConcurrency ?? 1) : 1;
  const { Tokenizer } = await import(new URL("../tokenizers/tokenizers.min.mjs", import.meta.url));
  const floats = gpu ? null : about.floats;
  const files = floats ? [floats.graph, ...about.files.slice(1)] : about.files;
  const [graph, weights, json, config] = await Promise.all(fetched(files));
  const tokenizer = plainTokenizer(Tokenizer, parsed(json), parsed(config));
  self.postMessage({ starting: true });
  const presents = about.layers.flatMap((_, i) => [`present.${i}.key`, `present.${i}.value`]);
  const session = await ort.InferenceSession.create(graph, {
    executionProviders: gpu ? ["webgpu", "wasm"] : ["wasm"],
    externalData: [floats ? { path: floats.data, data: unpacked(floats, weights) } : { path: files[1].name, data: weights }],
    ...(gpu && { preferredOutputLocation: Object.fromEntries(presents.map((name) => [name, "gpu-buffer"])) }),
  });
  gemma = new Gemma(ort, session, tokenizer, about);
  self.postMessage({ ready: gpu ? "WebGPU" : `WebAssembly, ${ort.env.wasm.numThreads} thread${ort.env.wasm.numThreads > 1 ? "s" : ""}` });
}

/** For so many logical processors, of which two may be one core. */
const threads = (processors) => (processors > 4 ? Math.min(8, Math.ceil(processors / 2)) : processors);

/** All weights as float32, which is what a processor multiplies fastest here. */
function unpacked({ bytes, tensors }, packed) {
  const data = new Uint8Array(bytes);
  for (const [to, count, bits, block, from, scalesFrom] of tensors) {
    const numbers = new Float32Array(data.buffer, to, count);
    if (bits === 32) {
      numbers.set(new Float32Array(packed.buffer, from, count));
      continue;
    }
    const scales = new Float32Array(packed.buffer, scalesFrom, count / block);
    for (let i = 0, b = 0; i < count; b++) {
      const scale = scales[b];
      const end = i + block;
      if (bits === 8) for (; i < end; i++) numbers[i] = (packed[from + i] - 128) * scale;
      else {
        for (; i < end; i += 2) {
          const pair = packed[from + i / 2];
          numbers[i] = ((pair & 15) - 8) * scale;
          numbers[i + 1] = ((pair >> 4) - 8) * scale;
        }
      }
    }
  }
  return data;
}

async function adapter() {
  try {
    return await navigator.gpu?.requestAdapter();
  } catch {
    return null;
  }
}

const parsed = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

/** The bytes of each file, while the page is told how many of all there are. */
function fetched(files) {
  const total = files.reduce((sum, { bytes }) => sum + bytes, 0);
  let got = 0;
  let told = 0;
  return files.map(async ({ name, bytes }) => {
    const response = await fetch(new URL(name, MODEL));
    if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
    const content = new Uint8Array(bytes);
    const reader = response.body.getReader();
    let at = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (at + part.value.length > bytes) throw new Error(`${name}: is longer than ${bytes} bytes; load the page anew`);
      content.set(part.value, at);
      at += part.value.length;
      got += part.value.length;
      if (got - told > total / SHARES || got === total) {
        told = got;
        self.postMessage({ loaded: got, total });
      }
    }
    if (at < bytes) throw new Error(`${name}: found ${at} bytes, expected ${bytes}; load the page anew`);
    return content;
  });
}

async function answer({ messages, settings }) {
  stopping = new AbortController();
  const prompt = gemma.prompt(messages);
  let began;
  const read = () => (began = performance.now());
  for await (const part of gemma.answer(prompt, settings, stopping.signal, read)) {
    const rate = part.ended && (1000 * part.written) / (performance.now() - began);
    self.postMessage({ ...part, prompt: prompt.length, rate });
  }
  self.postMessage({ done: true });
}
