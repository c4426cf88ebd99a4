// Answers that go on from what the caches hold, and the same from nothing: node rewinds.mjs WEB PROMPTS
// PROMPTS is a file of JSON: arrays of ids. Prints two arrays of texts, in which an id is its number.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";

const [web, prompts] = process.argv.slice(2);
const { Gemma } = await import(`${web}/page/gemma.js`);
const about = JSON.parse(readFileSync(`${web}/page/about.json`, "utf8"));
const exact = { extra: { session: { disable_prepacking: "1" } } };
const session = await ort.InferenceSession.create(`${web}/model/model.onnx`, exact);
const tokenizer = { decode: (ids) => ids.map((id) => `${id} `).join("") };
const { signal } = new AbortController();

async function text(gemma, prompt) {
  let found = "";
  for await (const part of gemma.answer(prompt, { temperature: 0, max_tokens: 12 }, signal)) found += part.text;
  return found;
}

const one = new Gemma(ort, session, tokenizer, about);
const reused = [];
const fresh = [];
for (const prompt of JSON.parse(readFileSync(prompts, "utf8"))) {
  reused.push(await text(one, prompt));
  fresh.push(await text(new Gemma(ort, session, tokenizer, about), prompt));
}
console.log(JSON.stringify([reused, fresh]));
