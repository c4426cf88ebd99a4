// Settings, the key, a title: what is asked for in dialogs.
import { key, models } from "./api.js";
import { byId, element } from "./dom.js";

/** Shows a dialog; its fields, or null where it was cancelled. */
async function shown(dialog, values) {
  const form = dialog.querySelector("form");
  form.reset();
  for (const [name, value] of Object.entries(values)) if (form.elements[name]) form.elements[name].value = value;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue ? form.elements : null;
}

byId("forget").addEventListener("click", () => {
  key.forget();
  byId("key-kept").hidden = true;
});

/** The settings as changed, or null. What is not set is not in them. */
export async function askSettings(settings) {
  const dialog = byId("settings");
  dialog.querySelector("select").replaceChildren(...models.map(({ name }) => element("option", {}, name)));
  byId("models").hidden = models.length < 2;
  byId("key-kept").hidden = !key.get();
  const found = await shown(dialog, { model: models[0]?.name ?? "", ...settings });
  if (!found) return null;
  const set = {};
  for (const { name, value, type } of found) {
    if (name && value.trim()) set[name] = type === "number" ? Number(value) : value;
  }
  if (set.model === models[0]?.name) delete set.model; // the server's first is its own choice
  return set;
}

/** Whether there is a key now. */
export async function askKey(words) {
  byId("key-words").textContent = `${words} Whoever started the server knows it: --api-key, or BEZEL_API_KEY.`;
  const found = await shown(byId("key"), {});
  if (found) key.set(found.key.value.trim(), found.always.checked);
  return found !== null;
}

export async function askTitle(title) {
  return (await shown(byId("naming"), { title }))?.title.value.trim() || null;
}
