// Markdown → DOM nodes. What a model writes is untrusted: it becomes text nodes and elements that are made here,
// never HTML. Every step is linear in the text, whatever the text is.
import { element, fill } from "./dom.js";

const DEEPEST = 12; // lists and quotes within one another
const MOST_OPEN = 32; // emphasis within emphasis
const LONGEST_LINK = 2000;

/** The nodes of a text. */
export function render(text) {
  return blocks(linesOf(text), 0, false).map((block) => block.node);
}

/** A text that is still being written, shown in `parent`: blocks that are complete are not looked at again. */
export class Live {
  #parent;
  #lines = [""]; // from the first block on that is not complete
  #settled = 0; // nodes of complete blocks

  constructor(parent) {
    this.#parent = parent;
  }

  push(text) {
    const [first, ...others] = text.split("\n");
    this.#lines[this.#lines.length - 1] += first;
    for (const line of others) this.#lines.push(line);
  }

  /** Shows what there is, with open emphasis, code and links as if they ended here. */
  draw() {
    this.#show(blocks(calm(this.#lines), 0, true));
  }

  end() {
    this.#show(blocks(linesOf(this.#lines.join("\n")), 0, false));
  }

  #show(found) {
    const nodes = found.map((block) => block.node);
    settle(this.#parent, this.#settled, nodes);
    if (found.length > 1) {
      this.#settled += found.length - 1;
      this.#lines.splice(0, found[found.length - 1].start);
    }
  }
}

const linesOf = (text) => text.split(/\r\n?|\n/);

/** Without a last line of which nobody can tell yet what it will be: markers alone, the head of a table. */
function calm(lines) {
  const last = lines[lines.length - 1];
  const shown = /^[-*+_=#>|`~:\s]*$|^\s*\d{1,9}[.)]?\s*$/.test(last) ? lines.slice(0, -1) : [...lines];
  const isRow = (line) => line !== undefined && line.trimStart().startsWith("|");
  if (isRow(shown[shown.length - 1]) && !isRow(shown[shown.length - 2])) shown.pop();
  return shown.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
}

// --- what is shown becomes what shall be shown, and keeps its nodes: selections and focus stay

function settle(parent, from, nodes) {
  let old = parent.childNodes[from];
  for (const node of nodes) {
    const next = old?.nextSibling;
    if (!old) parent.append(node);
    else if (!adopt(old, node)) old.replaceWith(node);
    old = next;
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

/** Whether `old` is of the kind of `node`; it then has its content. */
function adopt(old, node) {
  if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) {
    if (node.data.startsWith(old.data)) old.appendData(node.data.slice(old.data.length));
    else old.data = node.data;
    return true;
  }
  if (!old.cloneNode(false).isEqualNode(node.cloneNode(false))) return false;
  settle(old, 0, [...node.childNodes]);
  return true;
}

// --- blocks

/** The blocks of lines, each with the line where it starts. `live`: the last line is not complete. */
function blocks(lines, depth, live) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [node, next] =
      fence(lines, at) ??
      heading(lines, at, live) ??
      rule(lines, at) ??
      quote(lines, at, depth, live) ??
      list(lines, at, depth, live) ??
      table(lines, at, live) ??
      paragraph(lines, at, depth, live);
    found.push({ node, start: at });
    at = next;
  }
  return found;
}

const FENCE = /^(\s*)(`{3,}|~{3,})(?![`~])([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s|$)/;

/** Whether a paragraph ends before this line. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  const item = depth < DEEPEST && ITEM.exec(line);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    (depth < DEEPEST && QUOTE.test(line)) ||
    (item && /^(?:[-*+]|1[.)])$/.test(item[2])) ||
    columns(lines, at) > 0
  );
}

function fence(lines, at) {
  const start = FENCE.exec(lines[at]);
  if (!start) return null;
  const [, indent, mark, info] = start;
  const code = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const end = FENCE.exec(lines[next]);
    if (end && end[2][0] === mark[0] && end[2].length >= mark.length && !end[3].trim()) break;
    code.push(dedented(lines[next], indent.length));
  }
  const node = element(
    "figure",
    { class: "code" },
    element(
      "figcaption",
      {},
      element("span", {}, info.trim().split(/\s/, 1)[0].slice(0, 40)),
      element("button", { type: "button", class: "quiet", "data-copy": "code" }, "Copy"),
    ),
    element("pre", {}, element("code", {}, code.join("\n"))),
  );
  return [node, next + 1];
}

function heading(lines, at, live) {
  const start = HEADING.exec(lines[at]);
  if (!start) return null;
  const text = lines[at].slice(start[0].length).replace(/\s#+\s*$/, "");
  const level = Math.min(6, start[1].length + 2); // below the page's own
  const made = element(`h${level}`);
  fill(made, inline(text.trim(), live && at + 1 === lines.length));
  return [made, at + 1];
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [element("hr"), at + 1] : null;
}

function quote(lines, at, depth, live) {
  if (depth >= DEEPEST || !QUOTE.test(lines[at])) return null;
  const within = [];
  let next = at;
  for (; next < lines.length && QUOTE.test(lines[next]); next += 1) within.push(lines[next].replace(QUOTE, ""));
  const made = element("blockquote");
  fill(made, blocks(within, depth + 1, live && next === lines.length).map((block) => block.node));
  return [made, next];
}

function list(lines, at, depth, live) {
  const first = depth < DEEPEST && ITEM.exec(lines[at]);
  if (!first) return null;
  const kind = first[2].slice(-1);
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const found = ITEM.exec(lines[next]);
    if (!found || found[2].slice(-1) !== kind || RULE.test(lines[next])) break;
    const indent = columnsOf(found[1]);
    const width = indent + found[2].length + 1;
    const within = [lines[next].slice(found[0].length)];
    let blanks = 0;
    for (next += 1; next < lines.length; next += 1) {
      const line = lines[next];
      const own = columnsOf(/^\s*/.exec(line)[0]);
      if (!line.trim()) blanks += 1;
      else if (own >= indent + 2) blanks = 0;
      else if (blanks || ITEM.test(line) || interrupts(lines, next, depth)) break;
      within.push(dedented(line, width));
    }
    if (blanks) within.splice(-blanks);
    const inner = blocks(within, depth + 1, live && next === lines.length && !blanks).map((block) => block.node);
    items.push(inner);
    const following = next < lines.length && ITEM.exec(lines[next]);
    loose ||= blanks > 0 && following && following[2].slice(-1) === kind;
  }
  const number = parseInt(first[2], 10);
  const made = Number.isNaN(number) ? element("ul") : element("ol", { start: number === 1 ? null : String(number) });
  for (const nodes of items) {
    const tight = !loose && nodes[0]?.nodeName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
    const item = element("li");
    fill(item, tight);
    made.append(item);
  }
  return [made, next];
}

/** How many columns a table has that starts here; 0 where none does. */
function columns(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[\s|:-]*-[\s|:-]*$/.test(lines[at + 1])) return 0;
  const marks = cells(lines[at + 1]);
  const isTable = lines[at + 1].includes("|") && marks.every((mark) => /^:?-+:?$/.test(mark));
  return isTable && cells(lines[at]).length === marks.length ? marks.length : 0;
}

function table(lines, at, live) {
  const width = columns(lines, at);
  if (!width) return null;
  const sides = cells(lines[at + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : null,
  );
  const row = (name, texts, isLive) => {
    const made = element("tr");
    texts.slice(0, width).forEach((text, i) => {
      const cell = element(name, { class: sides[i], scope: name === "th" ? "col" : null });
      fill(cell, inline(text, isLive));
      made.append(cell);
    });
    return made;
  };
  const body = element("tbody");
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    body.append(row("td", cells(lines[next]), live && next + 1 === lines.length));
  }
  const head = element("thead", {}, row("th", cells(lines[at]), false));
  return [element("div", { class: "wide" }, element("table", {}, head, body)), next];
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      found[found.length - 1] += "|";
      i += 1;
    } else if (text[i] === "|") found.push("");
    else found[found.length - 1] += text[i];
  }
  if (found.length > 1 && !found[found.length - 1].trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at, depth, live) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !interrupts(lines, next, depth)) next += 1;
  const text = lines.slice(at, next).map((line) => line.trim().replace(/\\$/, ""));
  const made = element("p");
  fill(made, inline(text.join("\n"), live && next === lines.length));
  return [made, next];
}

/** How wide white space is. */
function columnsOf(space) {
  let width = 0;
  for (const sign of space) width += sign === "\t" ? 4 : 1;
  return width;
}

/** A line without its white space of up to `width` columns. */
function dedented(line, width) {
  let i = 0;
  for (let left = width; left > 0 && (line[i] === " " || line[i] === "\t"); i += 1) left -= line[i] === "\t" ? 4 : 1;
  return line.slice(i);
}

// --- within a line

const SPECIAL = /[\\`*_~[\]!<\n]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const TARGET = /\(\s?<?((?:[^\s<>()]|\([^\s<>()]{0,500}\)){1,2000})>?(?:\s"[^"\n]{0,500}")?\s?\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BREAK = /<br\s?\/?>/iy;

/** Texts and nodes. `live`: what is open ends here. */
function inline(source, live) {
  const text = live ? source.replace(/!?\[([^[\]\n]{0,300})\]\([^()\s]{0,2000}$/, "$1") : source;
  const pieces = [];
  const open = []; // emphasis: sign, how many, where in `pieces`
  const brackets = []; // where in `pieces`, how much emphasis was open
  const runs = backticks(text);
  const match = (pattern, at) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  let at = 0;
  while (at < text.length) {
    const found = match(SPECIAL, at);
    if (!found) break;
    if (found.index > at) pieces.push(text.slice(at, found.index));
    at = found.index;
    const sign = text[at];
    if (sign === "\n") {
      pieces.push(element("br"));
      at += 1;
    } else if (sign === "\\") {
      const escapes = PUNCTUATION.test(text[at + 1] ?? "");
      pieces.push(escapes ? text[at + 1] : sign);
      at += escapes ? 2 : 1;
    } else if (sign === "`") {
      at = codeSpan(text, at, runs, pieces, live);
    } else if (sign === "*" || sign === "_" || sign === "~") {
      at = emphasis(text, at, pieces, open, brackets, live);
    } else if (sign === "h") {
      at = bareLink(text, at, pieces, brackets.length > 0);
    } else if (sign === "<") {
      const [broken, angled] = [match(BREAK, at), match(ANGLED, at)];
      const href = angled && safe(angled[1]);
      pieces.push(broken ? element("br") : href ? link(href, [angled[1]]) : sign);
      at += broken ? broken[0].length : href ? angled[0].length : 1;
    } else if (sign === "]") {
      const bracket = brackets.pop();
      const target = bracket && match(TARGET, at + 1);
      const href = target && safe(target[1]);
      at += 1;
      if (!href) pieces.push(sign);
      else {
        const within = pieces.splice(bracket.at).slice(1);
        open.length = Math.min(open.length, bracket.open);
        brackets.length = 0; // no link within a link
        pieces.push(link(href, within));
        at += target[0].length;
      }
    } else {
      const isImage = sign === "!" && text[at + 1] === "["; // becomes a link: nothing is loaded
      if (sign === "[" || isImage) brackets.push({ at: pieces.length, open: open.length });
      pieces.push(isImage ? "![" : sign);
      at += isImage ? 2 : 1;
    }
  }
  pieces.push(text.slice(at));
  if (live) while (open.length) wrap(pieces, open, open[open.length - 1].n);
  return pieces;
}

/** Where runs of so many backticks are; `next` is the first that was not passed. */
function backticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { places: [], next: 0 });
    runs.get(run.length).places.push(index);
  }
  return runs;
}

function codeSpan(text, at, runs, pieces, live) {
  const n = runLength(text, at);
  const same = runs.get(n) ?? { places: [], next: 0 }; // after an escaped backtick a run is a shorter one
  while (same.places[same.next] <= at) same.next += 1;
  const end = same.places[same.next] ?? (live ? text.length : -1);
  if (end < 0) {
    pieces.push(text.slice(at, at + n));
    return at + n;
  }
  const code = text.slice(at + n, end).replaceAll("\n", " ");
  if (code.trim()) pieces.push(element("code", {}, /^ .* $/.test(code) ? code.slice(1, -1) : code));
  return end + n;
}

function runLength(text, at) {
  let n = 1;
  while (text[at + n] === text[at]) n += 1;
  return n;
}

/** A run of signs that opens or closes emphasis. Unlike CommonMark, punctuation beside `*` is no hindrance, for the
 * sake of scripts without spaces. */
function emphasis(text, at, pieces, open, brackets, live) {
  const sign = text[at];
  let n = runLength(text, at);
  const next = at + n;
  const [before, after] = [text[at - 1] ?? " ", text[next] ?? " "];
  const within = sign === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
  const sound = !within && (sign === "~" ? n === 2 : n <= 3);
  const opens = sound && !/\s/.test(after);
  const closes = sound && !/\s/.test(before);
  while (closes && n > 0) {
    const place = open.findLastIndex((one) => one.sign === sign);
    if (place < 0) break;
    open.length = place + 1; // what was opened since stays as it is written
    while (brackets.length && brackets[brackets.length - 1].at > open[place].at) brackets.pop();
    n -= wrap(pieces, open, n);
  }
  if (n > 0 && opens && open.length < MOST_OPEN) open.push({ sign, n, at: pieces.length });
  if (n > 0 && !(live && sound && next === text.length)) pieces.push(sign.repeat(n));
  return next;
}

/** Closes the emphasis that was opened last with up to `n` signs; how many it took. */
function wrap(pieces, open, n) {
  const opener = open[open.length - 1];
  const took = Math.min(2, n, opener.n);
  const made = element(opener.sign === "~" ? "del" : took === 2 ? "strong" : "em");
  fill(made, pieces.splice(opener.at + 1));
  opener.n -= took;
  pieces[opener.at] = opener.sign.repeat(opener.n);
  if (!opener.n) {
    pieces.pop();
    open.pop();
  }
  if (made.hasChildNodes()) pieces.push(made);
  return took;
}

function bareLink(text, at, pieces, inBrackets) {
  const pattern = /https?:\/\/[^\s<>"`]{1,2000}/y;
  pattern.lastIndex = at;
  const isLink = !inBrackets && !/\w/.test(text[at - 1] ?? "");
  const found = isLink && pattern.exec(text)?.[0].replace(/[\])}.,;:!?*_~'|]{1,50}$/, "");
  const href = found && safe(found);
  pieces.push(href ? link(href, [found]) : "h");
  return at + (href ? found.length : 1);
}

/** An address that a link may have, else null: no script, no file, nothing of this server's. */
export function safe(address) {
  if (address.length > LONGEST_LINK || !URL.canParse(address)) return null;
  const url = new URL(address);
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

function link(href, pieces) {
  const made = element("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
  fill(made, pieces);
  return made;
}
