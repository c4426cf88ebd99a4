// What the buttons named Copy do.
import { element } from "./dom.js";

/** Puts a text on the clipboard, and says so on the button that was pressed. */
export async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https there is no clipboard for pages from another computer; what is selected can be copied nevertheless.
    const hidden = element("textarea", { class: "unseen" });
    document.body.append(hidden);
    hidden.value = text;
    hidden.select();
    document.execCommand("copy");
    hidden.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  setTimeout(() => (pressed.textContent = "Copy"), 2000);
}

document.addEventListener("click", (event) => {
  const pressed = event.target.closest?.("[data-copy]");
  if (pressed) copy(pressed.closest(".code").querySelector("code").textContent, pressed);
});
