// Small texts by name that the browser keeps; where it keeps nothing, they stay until the page is left.

function small(kind) {
  const held = new Map();
  let real = null;
  try {
    real = window[kind];
  } catch {
    // All site data is blocked: asking is an error.
  }
  return {
    get: (name) => (real ? real.getItem(name) : (held.get(name) ?? null)),
    set: (name, text) => (real ? real.setItem(name, text) : held.set(name, text)),
    forget: (name) => (real ? real.removeItem(name) : held.delete(name)),
  };
}

export const ofThisTab = small("sessionStorage");
export const ofThisBrowser = small("localStorage");
