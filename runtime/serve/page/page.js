// The page: which conversation is shown, what is being answered, and what its buttons do.

import { Answering } from "./answering.js";
import { askModels, key, modelOf, models } from "./api.js";
import { copy } from "./copying.js";
import { askKey, askSettings, askTitle } from "./dialogs.js";
import { byId, element, plural } from "./dom.js";
import { anyWaiting, putBack, takePictures, takeWaiting } from "./pictures.js";
import { ofThisBrowser } from "./small.js";
import * as store from "./store.js";
import { Writing, foot, turn } from "./view.js";

const LONGEST_TITLE = 60;
const MUTE = "This model has no chat template: it continues texts, and does not chat. Programs ask it by /v1/completions.";

let shown = fresh(); // the conversation
let following = true; // whether the end stays in view
const running = new Map(); // by conversation: what is being answered
const notices = new Map(); // by conversation: what must be said below it, and buttons

const box = byId("box");

function fresh() {
  return { id: store.newId(), title: "", changed: 0, settings: lastSettings(), messages: [] };
}

function lastSettings() {
  return JSON.parse(ofThisBrowser.get("settings") ?? "{}");
}

// --- what is seen

function draw() {
  const answering = running.get(shown.id);
  const title = shown.title || "New conversation";
  byId("title").textContent = title;
  document.title = shown.title ? `${title} – bezel` : "bezel";
  const turns = shown.messages.map((message, i) => turn(message, acts(i), models.length > 1));
  for (const other of running.values()) other.writing?.close();
  for (const other of running.values()) other.writing = null;
  if (answering) {
    answering.writing = new Writing(answering.reply.text, answering.since, follow);
    turns.push(answering.writing.node);
  }
  byId("talk").replaceChildren(...(turns.length ? turns : [empty()]));
  for (const name of ["rename", "export", "delete"]) byId(name).disabled = !shown.messages.length;
  drawSend();
  drawNotice();
  follow();
}

function empty() {
  const model = modelShown();
  const words = model ? `A context of ${plural(model.context, "token")}. ` : "";
  return element(
    "div",
    { class: "empty" },
    element("strong", {}, model?.name ?? "bezel"),
    isMute() ? MUTE : `${words}Conversations are kept in this browser only.`,
  );
}

const modelShown = () => modelOf(shown.settings.model) ?? models[0];
const isMute = () => modelShown()?.chats === false;
const isBlind = () => !modelShown()?.sees;

function drawSend() {
  const stops = running.has(shown.id);
  box.disabled = byId("send").disabled = isMute() && !stops;
  byId("picture").hidden = isBlind();
  byId("send").textContent = stops ? "Stop" : "Send";
  byId("send").classList.toggle("stops", stops);
  byId("talk").classList.toggle("answering", stops);
}

function drawNotice() {
  const last = shown.messages.at(-1);
  const isOpen = last?.role === "user" && !running.has(shown.id);
  const unanswered = { words: "There is no answer to this yet.", acts: [["Answer", answer]], calm: true };
  const isEdited = document.querySelector(".edit");
  const found = isEdited ? null : (notices.get(shown.id) ?? (isOpen ? unanswered : null));
  const parts = found
    ? [
        element("p", { class: found.calm && "calm" }, found.words),
        ...found.acts.map(([words, act]) => element("button", { type: "button", click: act }, words)),
      ]
    : [];
  byId("notice").replaceChildren(...parts);
  if (found) follow();
}

/** Says something below the conversation that is shown. */
function notify(words, acts = [], calm = false) {
  notices.set(shown.id, { words, acts, calm });
  drawNotice();
}

async function drawList() {
  const found = await store.titles().catch((error) => {
    notify(`This browser keeps no conversations: ${error.message}`);
    return [];
  });
  const rows = found.map(({ id, title }) => {
    const attributes = { href: `#${id}`, "aria-current": id === shown.id && "page", class: running.has(id) && "busy" };
    return element("li", {}, element("a", attributes, title));
  });
  byId("list").replaceChildren(...rows);
}

function follow() {
  if (following) window.scrollTo(0, document.documentElement.scrollHeight);
  byId("down").hidden = following;
}

function isAtEnd() {
  return window.scrollY + window.innerHeight >= document.documentElement.scrollHeight - 40;
}

/** Tells screen readers, which do not read an answer while it is being written. */
function say(words) {
  byId("status").textContent = words;
}

function toBox() {
  if (!matchMedia("(pointer: coarse)").matches) box.focus({ preventScroll: true }); // no keyboard over the answer
}

// --- which conversation

async function show() {
  const id = decodeURIComponent(location.hash.slice(1));
  if (byId("conversations").matches(":popover-open")) byId("conversations").hidePopover();
  const found = running.get(id)?.conversation ?? ((id && (await store.read(id))) || fresh());
  if (id !== decodeURIComponent(location.hash.slice(1))) return; // another one was wanted meanwhile
  notices.delete(shown.id);
  shown = found;
  following = true;
  draw();
  toBox();
  await drawList();
}

async function keep(conversation) {
  try {
    await store.write(conversation);
  } catch (error) {
    notify(`This browser does not keep the conversation: ${error.message}`);
  }
}

function go(id) {
  if (location.hash === `#${id}`) show();
  else location.hash = id;
}

// --- asking and answering

async function send(text, pictures = []) {
  following = true;
  shown.messages.push({ role: "user", text, ...(pictures.length && { pictures }) });
  shown.title ||= titleOf(text);
  history.replaceState(null, "", `#${shown.id}`);
  await answer();
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0] || "A picture";
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE).replace(/\s\S*$/, "")}…` : line;
}

/** Has the conversation that is shown answered. */
async function answer() {
  const done = answerTo(shown);
  running.get(shown.id).done = done;
  await done;
}

async function answerTo(conversation) {
  const answering = new Answering(conversation, keep);
  running.set(conversation.id, answering);
  notices.delete(conversation.id);
  conversation.changed = Date.now();
  draw();
  say("The model is answering.");
  await keep(conversation);
  drawList();
  try {
    await answering.run();
    const { text, ended } = answering.reply;
    if (!text && ended !== "stopped") {
      notices.set(conversation.id, { words: "The model had nothing to say.", acts: [retry] });
    }
  } catch (error) {
    fail(conversation, error);
  }
  running.delete(conversation.id);
  conversation.changed = Date.now();
  if (answering.reply.text) conversation.messages.push(answering.reply);
  await keep(conversation);
  drawList();
  if (shown !== conversation) return;
  const last = conversation.messages.length - 1;
  if (!answering.reply.text) draw();
  else {
    answering.writing.end(foot(answering.reply, acts(last), models.length > 1));
    say(answering.writing.node.querySelector(".text").innerText);
  }
  drawSend();
  drawNotice();
}

const retry = ["Try again", again];

/** Answers the last message of the user's, once more or at last. */
function again() {
  if (shown.messages.at(-1)?.role === "assistant") shown.messages.pop();
  following = true;
  answer();
  toBox();
}

function fail(conversation, error) {
  const acts = {
    long: [["Begin a new conversation with it", moveOn], ["Edit", editLast]],
    key: [["Enter the key", enterKey]],
  };
  notices.set(conversation.id, { words: error.message, acts: acts[error.kind] ?? [retry] });
  if (error.kind === "key" && shown === conversation) setTimeout(enterKey);
}

async function enterKey() {
  const words = key.get() ? "The server did not take this key." : "This server asks for a key.";
  if (!(await askKey(words))) return;
  await loadModels();
  if (shown.messages.at(-1)?.role === "user" && !running.has(shown.id)) again();
}

/** What did not fit into this conversation goes into the box of a new one. */
async function moveOn() {
  const { text, pictures } = shown.messages.pop();
  if (shown.messages.length) await keep(shown);
  else await store.remove(shown.id);
  box.value = text;
  putBack(pictures ?? []);
  go("new");
}

// --- what is below a message

function acts(i) {
  const { role, text } = shown.messages[i];
  const found = [["Copy", (event) => copy(text, event.target)]];
  if (role === "user") found.push(["Edit", () => edit(i), true]);
  if (role === "assistant" && i === shown.messages.length - 1) found.push(["Answer again", again, true]);
  return found;
}

const editLast = () => edit(shown.messages.length - 1);

/** Puts a message of the user's into a box; sending it drops what came after it. */
function edit(i) {
  const conversation = shown;
  const article = byId("talk").children[i];
  const field = element("textarea", { "aria-label": "Message", dir: "auto" });
  field.value = conversation.messages[i].text;
  const after = conversation.messages.length - 1 - i;
  const close = () => {
    draw();
    byId("talk").children[i]?.querySelector(".acts button:last-child")?.focus();
  };
  const submit = (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    if (!i && conversation.title === titleOf(conversation.messages[0].text)) conversation.title = "";
    const { pictures } = conversation.messages[i];
    conversation.messages.length = i;
    send(field.value, pictures);
    toBox();
  };
  const form = element(
    "form",
    {
      class: "edit",
      submit,
      keydown: (event) => {
        if (event.key === "Escape") close();
        else if (event.target === field && sends(event)) submit(event);
      },
    },
    field,
    after > 0 && element("p", { class: "soft" }, `Sending it drops the ${plural(after, "message")} below.`),
    element(
      "span",
      {},
      element("button", {}, "Send"),
      " ",
      element("button", { type: "button", class: "quiet", click: close }, "Cancel"),
    ),
  );
  article.replaceChildren(form);
  drawNotice();
  field.focus();
}

// --- keys and buttons

/** Whether a key sends: Enter where there is a keyboard, and with Ctrl or Cmd anywhere. */
function sends(event) {
  if (event.key !== "Enter" || event.isComposing) return false;
  return event.ctrlKey || event.metaKey || !(event.shiftKey || matchMedia("(pointer: coarse)").matches);
}

function submitBox() {
  const text = box.value;
  if ((!text.trim() && !anyWaiting()) || running.has(shown.id)) return;
  box.value = "";
  send(text, takeWaiting());
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(shown.id)) running.get(shown.id).stop();
  else submitBox();
});

box.addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  submitBox();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) {
    running.get(shown.id)?.stop();
  }
});

window.addEventListener("scroll", () => {
  following = isAtEnd();
  byId("down").hidden = following;
});

byId("down").addEventListener("click", () => {
  following = true;
  follow();
});

byId("skip").addEventListener("click", () => box.focus());

byId("set").addEventListener("click", async () => {
  const set = await askSettings(shown.settings);
  if (!set) return;
  shown.settings = set;
  ofThisBrowser.set("settings", JSON.stringify(set));
  if (shown.messages.length) await keep(shown);
  else draw();
});

// --- the menu

function onMenu(name, act) {
  byId(name).addEventListener("click", () => {
    byId("menu").hidePopover();
    act();
  });
}

onMenu("rename", async () => {
  const conversation = shown;
  const title = await askTitle(conversation.title);
  if (!title) return;
  conversation.title = title;
  await keep(conversation);
  byId("title").textContent = title;
  await drawList();
});

onMenu("delete", async () => {
  const gone = shown;
  running.get(gone.id)?.stop();
  await running.get(gone.id)?.done;
  await store.remove(gone.id);
  history.replaceState(null, "", "#new");
  await show();
  const undo = async () => {
    await keep(gone);
    go(gone.id);
  };
  notify(`“${gone.title}” is deleted.`, [["Undo", undo]], true);
});

onMenu("export", () => {
  const address = URL.createObjectURL(new Blob([JSON.stringify(shown, null, 1)], { type: "application/json" }));
  const name = shown.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  element("a", { href: address, download: `${name || "conversation"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
});

onMenu("import", () => byId("file").click());

byId("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  const text = await file.text();
  let found = null;
  try {
    found = store.checked(JSON.parse(text));
  } catch {
    // no JSON
  }
  if (!found?.messages.length) return notify(`${file.name} is not a conversation that was saved here.`);
  const conversation = { ...found, id: store.newId(), changed: Date.now() };
  await keep(conversation);
  return go(conversation.id);
});

// --- beginning

async function loadModels() {
  try {
    await askModels();
    if (!shown.messages.length) draw();
  } catch (error) {
    if (error.kind === "key") return enterKey();
    notify(error.message, [["Try again", () => (notices.delete(shown.id), loadModels())]]);
  }
  return undefined;
}

store.onChange(async (id) => {
  if (id === shown.id && !running.has(id) && !document.querySelector(".edit")) {
    shown = (await store.read(id)) ?? shown;
    draw();
  }
  await drawList();
});

for (const name of ["error", "unhandledrejection"]) {
  window.addEventListener(name, (event) => notify(`Something is wrong in this page: ${event.reason ?? event.message}`));
}
takePictures(
  () => (isBlind() ? `${modelShown()?.name ?? "This model"} sees no pictures.` : null),
  (words) => notify(words),
);
window.addEventListener("hashchange", show);
show().finally(loadModels);
