// Conversations in IndexedDB: unlike localStorage it has room for long ones, and writing one does not stop the page.

const opening = new Promise((resolve, reject) => {
  const asked = indexedDB.open("bezel", 1);
  asked.onupgradeneeded = () => {
    const store = asked.result.createObjectStore("conversations", { keyPath: "id" });
    store.createIndex("titles", ["changed", "title"]); // a list of them reads no texts
  };
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => reject(asked.error);
});
opening.catch(() => {}); // whoever needs it is told

const changes = new BroadcastChannel("bezel");

/** Calls `listen` with the id of each conversation that another tab changed. */
export function onChange(listen) {
  changes.onmessage = (event) => listen(event.data);
}

async function within(mode, work) {
  const transaction = (await opening).transaction("conversations", mode);
  return new Promise((resolve, reject) => {
    const asked = work(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** Ids and titles, what changed last first. */
export async function titles() {
  const found = [];
  await within("readonly", (store) => {
    store.index("titles").openKeyCursor(null, "prev").onsuccess = (event) => {
      const cursor = event.target.result;
      if (!cursor) return;
      found.push({ id: cursor.primaryKey, title: cursor.key[1] });
      cursor.continue();
    };
  });
  return found;
}

/** A conversation, or null where there is none. */
export async function read(id) {
  return checked(await within("readonly", (store) => store.get(id)));
}

export async function write(conversation) {
  await within("readwrite", (store) => store.put(conversation));
  changes.postMessage(conversation.id);
}

export async function remove(id) {
  await within("readwrite", (store) => store.delete(id));
  changes.postMessage(id);
}

export const newId = () => [...crypto.getRandomValues(new Uint8Array(12))].map((n) => n.toString(36)).join("");

/** A conversation with what it must have and nothing else, or null; `value` is from a file or another version. */
export function checked(value) {
  const isText = (text) => typeof text === "string";
  if (!isText(value?.id) || !isText(value.title) || !Array.isArray(value.messages)) return null;
  const messages = value.messages.map((message) => {
    if (!["user", "assistant"].includes(message?.role) || !isText(message.text)) return null;
    const kept = { role: message.role, text: message.text };
    const pictures = Array.isArray(message.pictures) ? message.pictures : [];
    if (!pictures.every((address) => isText(address) && /^data:image\/[\w.+-]+;base64,/.test(address))) return null;
    if (pictures.length) kept.pictures = pictures;
    if (isText(message.ended)) kept.ended = message.ended;
    if (isText(message.model)) kept.model = message.model;
    const figures = Object.entries(message.figures ?? {}).filter(([, n]) => Number.isFinite(n));
    if (figures.length) kept.figures = Object.fromEntries(figures);
    return kept;
  });
  if (messages.includes(null)) return null;
  const settings = Object.entries(value.settings ?? {}).filter(([, set]) => isText(set) || Number.isFinite(set));
  const changed = Number.isFinite(value.changed) ? value.changed : 0;
  return { id: value.id, title: value.title, changed, settings: Object.fromEntries(settings), messages };
}
