"""What a Gemma 3 model says of a picture, greedily: python see.py FOLDER PICTURE QUESTION TOKENS

FOLDER is of `bezel export --target portable`. generate.py is the same without pictures, and says what the caches are.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import PIL.Image
import sentencepiece

CONTEXT, CHUNK = 1024, 128  # positions that fit, and tokens of text that are fed at once at most

folder, picture, question, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
config = json.loads((folder / "config.json").read_text())
window, ends = config["text_config"]["sliding_window"], config["eos_token_id"]
decoder, embedding, vision = (
    onnxruntime.InferenceSession(folder / name) for name in ("model.onnx", "embedding.onnx", "vision.onnx")
)
n_rows = config["mm_tokens_per_image"]
slots = {"slots.global": CONTEXT, "slots.local": window + max(CHUNK, n_rows) - 1}  # a picture is fed whole
shapes = {value.name: value.shape for value in decoder.get_inputs() if value.name.startswith("past.")}
caches = {name: np.zeros([slots.get(size, size) for size in shape], np.float32) for name, shape in shapes.items()}
names = ["logits", *(name.replace("past", "present") for name in caches)]
position = 0


def feed(rows, is_picture):
    """The logits of the last of `rows`, a text's or those of one whole picture."""
    global position
    n = len(rows)
    positions = np.arange(position, position + n)
    ends_of_blocks = np.full(n, position + n) if is_picture else positions + 1  # of a picture each row sees all
    inputs = {"rows": rows, "positions": positions, "wanted": np.array([n - 1])}
    inputs["blocks"] = np.stack([positions, ends_of_blocks], axis=1)
    logits, *presents = decoder.run(names, inputs | caches)
    caches.update(zip(caches, presents, strict=True))
    position += n
    return logits[0]


def feed_text(ids):
    for start in range(0, len(ids), CHUNK):
        (rows,) = embedding.run(None, {"input_ids": np.array(ids[start : start + CHUNK])})
        logits = feed(rows, is_picture=False)
    return logits


def rows_of(picture):
    prepared = json.loads((folder / "preprocessor_config.json").read_text())
    size = prepared["size"]["width"], prepared["size"]["height"]
    pixels = np.asarray(PIL.Image.open(picture).convert("RGB").resize(size, prepared["resample"])) / 255
    normal = (pixels - prepared["image_mean"]) / prepared["image_std"]
    return vision.run(None, {"pixels": normal.transpose(2, 0, 1)[None].astype(np.float32)})[0]


ids = {piece: tokenizer.piece_to_id(piece) for piece in ("<start_of_turn>", "<end_of_turn>")}
ids |= {piece: tokenizer.piece_to_id(piece) for piece in ("<start_of_image>", "<end_of_image>")}
before = [tokenizer.bos_id(), ids["<start_of_turn>"], *tokenizer.encode("user\n\n\n"), ids["<start_of_image>"]]
after = [ids["<end_of_image>"], *tokenizer.encode(f"\n\n{question}"), ids["<end_of_turn>"], *tokenizer.encode("\n")]
after += [ids["<start_of_turn>"], *tokenizer.encode("model\n")]
if len(before) + n_rows + len(after) + count > CONTEXT:
    sys.exit(f"the question and {count} more tokens do not fit into {CONTEXT}")
feed_text(before)
feed(rows_of(picture), is_picture=True)
logits, answer = feed_text(after), []
while len(answer) < count:
    answer.append(int(logits.argmax()))
    if answer[-1] in ends:
        break
    logits = feed_text(answer[-1:])
print(json.dumps(answer))
print(tokenizer.decode(answer))
