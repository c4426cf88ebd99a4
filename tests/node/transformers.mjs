// Greedy ids by transformers.js: node transformers.mjs FOLDER PROMPT TOKENS
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompt, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const exact = { extra: { session: { disable_prepacking: "1" } } }; // activations stay float32
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), { session_options: exact });
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const found = await model.generate({ ...tokenizer(prompt), do_sample: false, max_new_tokens: Number(count) });
console.log(JSON.stringify(found.tolist()[0].map(Number)));
