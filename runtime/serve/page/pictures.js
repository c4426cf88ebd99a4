// Pictures that go with the next message: pasted, dropped, or chosen.
import { byId, element } from "./dom.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff"];
const UNSEEN_HERE = ["image/tiff"]; // by browsers, of these
const MOST_BYTES = 20 * 1024 * 1024;

let waiting = []; // data URLs
let tell = () => {};

/** Takes pictures from now on; `refuse` says why one is not taken, or null where the model sees them. */
export function takePictures(refuse, say) {
  tell = say;
  const take = async (files) => {
    for (const file of files) {
      const why = refuse() ?? reasonAgainst(file) ?? (await damage(file));
      if (why) tell(why);
      else waiting.push(await addressOf(file));
    }
    draw();
  };
  window.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });
  window.addEventListener("dragover", (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  });
  window.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
  byId("picture").addEventListener("click", () => byId("picture-file").click());
  byId("picture-file").addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = "";
  });
}

export const anyWaiting = () => waiting.length > 0;

/** What waits, which from now on belongs to a message. */
export function takeWaiting() {
  const taken = waiting;
  waiting = [];
  draw();
  return taken;
}

/** Has these wait again. */
export function putBack(pictures) {
  waiting = [...pictures];
  draw();
}

function reasonAgainst({ name, type, size }) {
  if (!KINDS.includes(type)) return `${name} is no picture of a kind that is read here.`;
  return size > MOST_BYTES ? `${name} is larger than 20 MB.` : null;
}

/** Why a file cannot be seen, which is better known before a question is written about it; or null. */
async function damage(file) {
  if (UNSEEN_HERE.includes(file.type)) return null; // the server says
  try {
    (await createImageBitmap(file)).close();
    return null;
  } catch {
    return `${file.name} is damaged, or no picture.`;
  }
}

function addressOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function draw() {
  const shown = waiting.map((address, i) =>
    element(
      "span",
      {},
      element("img", { src: address, alt: `Picture ${i + 1}` }),
      element("button", { type: "button", "aria-label": `Leave picture ${i + 1} out`, click: () => leaveOut(i) }, "×"),
    ),
  );
  byId("pictures").replaceChildren(...shown);
}

function leaveOut(i) {
  waiting.splice(i, 1);
  draw();
  byId("box").focus();
}
