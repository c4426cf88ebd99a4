/**
 * What went wrong, in words. `kind`: "gone" (no answer, or no model), "key" (the server wants one), "long" (the context
 * is full), "busy", or "refused".
 */
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}
