"""Greedy text from a folder of `bezel export --target portable`: python generate.py FOLDER PROMPT TOKENS"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import sentencepiece

CONTEXT, CHUNK = 4096, 128  # positions that fit, and tokens that are fed at once at most

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
config = json.loads((folder / "config.json").read_text())
window, ends = config.get("sliding_window", 0), config["eos_token_id"]
session = onnxruntime.InferenceSession(folder / "model.onnx")

# A cache is float32 (1, heads, slots, head_dim), all zeros. Position p is kept in slot p mod slots: local layers need
# slots for a window and a chunk, the others for every position.
slots = {"slots.global": CONTEXT, "slots.local": window + CHUNK - 1}
shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past.")}
caches = {name: np.zeros([slots.get(size, size) for size in shape], np.float32) for name, shape in shapes.items()}
names = ["logits", *(name.replace("past", "present") for name in caches)]


def feed(ids, start):
    """The logits of the last of `ids`, which have the positions `start`, `start` + 1, …"""
    inputs = {"input_ids": np.array(ids), "positions": np.arange(start, start + len(ids))}
    inputs["wanted"] = np.array([len(ids) - 1])  # np.arange(len(ids)) gets the logits of all
    logits, *presents = session.run(names, inputs | caches)
    caches.update(zip(caches, presents, strict=True))
    return logits[0]


ids = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
if len(ids) + count > CONTEXT:
    sys.exit(f"{len(ids)} tokens and {count} more do not fit into {CONTEXT}")
for start in range(0, len(ids), CHUNK):
    logits = feed(ids[start : start + CHUNK], start)
while count > 0:
    count -= 1
    ids.append(int(logits.argmax()))
    if ids[-1] in ends:
        break
    logits = feed(ids[-1:], len(ids) - 1)
print(json.dumps(ids))
print(tokenizer.decode(ids))
