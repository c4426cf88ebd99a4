"""The page's Markdown: text → DOM, in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from scripted import HOSTILE

PageOf = Callable[..., Any]  # of playwright, which may not be there

CODE = (
    '<figure class="code"><figcaption><span>{}</span><button type="button" class="quiet" data-copy="code">Copy</button>'
    "</figcaption><pre><code>{}</code></pre></figure>"
)
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'
TABLE = '<div class="wide"><table><thead>{}</thead><tbody>{}</tbody></table></div>'

MARKDOWN = {
    "": "",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "# a #\n## b\n###### c": "<h3>a</h3><h4>b</h4><h6>c</h6>",
    "#a": "<p>#a</p>",
    "*a* _b_ **c** __d__ ***e*** ~~f~~": (
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em> <del>f</del></p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "a_b_c 2 * 3 * 4 ~a~": "<p>a_b_c 2 * 3 * 4 ~a~</p>",
    "**open *and": "<p>**open *and</p>",
    "**注意：**请": "<p><strong>注意：</strong>请</p>",
    r"\*a\* \\ \a": r"<p>*a* \ \a</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    "`<b>` &amp; <b>": "<p><code>&lt;b&gt;</code> &amp;amp; &lt;b&gt;</p>",
    "```python x\n*a*\n\n  b\n```\nc": CODE.format("python", "*a*\n\n  b") + "<p>c</p>",
    "~~~\n```\n~~~": CODE.format("", "```"),
    "````\n```\n````": CODE.format("", "```"),
    "```\nopen": CODE.format("", "open"),
    "- a\n- b\n  - c\n    1. d\n- e": "<ul><li>a</li><li>b<ul><li>c<ol><li>d</li></ol></li></ul></li><li>e</li></ul>",
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "3) a\n4) b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\nlazy\n\nb": "<ul><li>a<br>lazy</li></ul><p>b</p>",
    "1. a\n   ```\n   x\n     y\n   ```\n2. b": "<ol><li>a" + CODE.format("", "x\n  y") + "</li><li>b</li></ol>",
    "a\n- b": "<p>a</p><ul><li>b</li></ul>",
    "in\n1984. a": "<p>in<br>1984. a</p>",
    "> a\n> > b\n> - c\n\nd": (
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li>c</li></ul></blockquote><p>d</p>"
    ),
    "a\n\n---\n* * *": "<p>a</p><hr><hr>",
    "|a|b|\n|:-|-:|\n|1|`x\\|y`|\n|**2**|\nc": TABLE.format(
        '<tr><th scope="col">a</th><th class="right" scope="col">b</th></tr>',
        '<tr><td>1</td><td class="right"><code>x|y</code></td></tr><tr><td><strong>2</strong></td></tr>',
    )
    + "<p>c</p>",
    "text\na | b\n--|--\n1 | 2<br>3": "<p>text</p>"
    + TABLE.format('<tr><th scope="col">a</th><th scope="col">b</th></tr>', "<tr><td>1</td><td>2<br>3</td></tr>"),
    "a | b": "<p>a | b</p>",
    "[a *b*](https://x.example/y_(z) 'no')": "<p>[a <em>b</em>]("
    + LINK.format("https://x.example/y_(z", "https://x.example/y_(z")
    + ") 'no')</p>",
    '[a *b*](https://x.example/y_(z) "title")': "<p>" + LINK.format("https://x.example/y_(z)", "a <em>b</em>") + "</p>",
    "https://x.example/a_b_c, <mailto:a@x.example>": "<p>"
    + LINK.format("https://x.example/a_b_c", "https://x.example/a_b_c")
    + ", "
    + LINK.format("mailto:a@x.example", "mailto:a@x.example")
    + "</p>",
    "**https://x.example**": "<p><strong>" + LINK.format("https://x.example/", "https://x.example") + "</strong></p>",
    "[a [b](https://x.example)](https://y.example)": "<p>[a "
    + LINK.format("https://x.example/", "b")
    + "]("
    + LINK.format("https://y.example/", "https://y.example")
    + ")</p>",
    "*[a*](mailto:x)": "<p><em>[a</em>](mailto:x)</p>",
    "[*a](mailto:x)*": "<p>" + LINK.format("mailto:x", "*a") + "*</p>",
    "[a](x) [b] array[1](2)": "<p>[a](x) [b] array[1](2)</p>",
    "a\r\n\r\n- b\r\n": "<p>a</p><ul><li>b</li></ul>",
}

RENDER = """async (text) => {
  const { render } = await import("/page/markdown.js");
  const made = document.createElement("div");
  made.append(...render(text));
  return made.innerHTML;
}"""

# Pushes a text in pieces; its HTML when it is complete, what was seen on the way, and whether finished blocks stayed.
WRITE = """async ([text, sizes]) => {
  const { Live } = await import("/page/markdown.js");
  const made = document.createElement("div");
  const live = new Live(made);
  const seen = [];
  let first = null;
  let at = 0;
  for (let i = 0; at < text.length; i += 1) {
    live.push(text.slice(at, at + sizes[i % sizes.length]));
    at += sizes[i % sizes.length];
    live.draw();
    seen.push(made.textContent);
    if (made.children.length > 1) first ??= made.firstChild;
  }
  live.end();
  return { html: made.innerHTML, seen, stayed: !first || first === made.firstChild };
}"""


def test_markdown(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted)
    for text, html in MARKDOWN.items():
        assert page.evaluate(RENDER, text) == html, text


@pytest.mark.parametrize("sizes", [[1], [2, 3], [7, 1, 4], [50]])
def test_markdown_in_pieces(sizes: list[int], scripted: str, page_of: PageOf) -> None:
    """Whatever the pieces, the end is what the whole text is."""
    page = page_of(scripted)
    for text in ["\n\n".join(MARKDOWN), *MARKDOWN, HOSTILE]:
        written = page.evaluate(WRITE, [text, sizes])
        assert written["html"] == page.evaluate(RENDER, text), text
        assert written["stayed"], text


CALM = """## Title

Some **bold words** and *others*, `code` and [a link](https://x.example/path).

| a | b |
|---|---|
| 1 | 2 |

- one
- **two**

```python
x = 1
```

The end.
"""


def test_what_is_being_written_keeps_its_nodes(scripted: str, page_of: PageOf) -> None:
    """So that what is selected in it stays selected."""
    kept = """async (text) => {
      const { Live } = await import("/page/markdown.js");
      const made = document.createElement("div");
      const live = new Live(made);
      live.push(text);
      live.draw();
      const nodes = [made.querySelector("li"), made.querySelector("li").firstChild];
      live.push(" and **more**\\n- c");
      live.draw();
      return nodes.every((node) => made.contains(node)) && made.textContent === "a and moreb and morec";
    }"""
    page = page_of(scripted)
    assert page.evaluate(kept, "- a and **more**\n- b")


def test_half_open_marks_are_not_seen(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted)
    seen = page.evaluate(WRITE, [CALM, [1]])["seen"]
    flashes = [text for text in seen if re.search(r"[*`#|]|--|^- |\]\(|https", text, re.MULTILINE)]
    assert flashes == []
    assert all(later.startswith(earlier[:-12]) for earlier, later in itertools.pairwise(seen))
