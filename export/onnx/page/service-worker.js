// Keeps every file of the page in the browser, so that it works without a network, and isolates the page, which
// threads that share memory ask for and few servers say.

const VERSION = "bezel VERSION"; // of the files, by their content

self.addEventListener("install", () => self.skipWaiting());

self.addEventListener("activate", (event) => {
  const takeOver = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith("bezel ") && name !== VERSION);
    for (const name of old) await caches.delete(name);
    await self.clients.claim();
    const pages = old.length ? await self.clients.matchAll({ type: "window" }) : [];
    for (const page of pages) page.postMessage("renewed"); // kept for a page that does not listen yet
  };
  event.waitUntil(takeOver());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(self.registration.scope)) event.respondWith(answer(event));
});

async function answer({ request }) {
  const cache = await caches.open(VERSION);
  const address = request.url.split(/[?#]/)[0].replace(/\/index\.html$/, "/");
  const kept = await cache.match(address);
  if (kept) return kept;
  const found = await fetch(address, { cache: "no-cache" });
  const headers = new Headers(found.headers);
  headers.set("cross-origin-opener-policy", "same-origin");
  headers.set("cross-origin-embedder-policy", "require-corp");
  const [now, later] = found.body ? found.body.tee() : [null, null];
  const { status, statusText } = found;
  if (found.ok) {
    // What does not fit is loaded again next time.
    cache.put(address, new Response(later, { status, statusText, headers })).catch(() => cache.delete(address));
  }
  return new Response(now, { status, statusText, headers });
}
