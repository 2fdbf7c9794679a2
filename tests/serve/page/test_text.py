"""What models write is shown as a little Markdown, and is never read as HTML."""

from __future__ import annotations

import json

import pytest

from tests.serve.page.driver import Chat
from tests.serve.page.fake import Fake

EVIL = """<img src=x onerror="window.wrong.push('run')"> <script>window.wrong.push('run')</script>
**<b onclick=x>bold</b>** `<i>` [click](javascript:window.wrong.push('run'))

```html
<iframe src="https://example.com"></iframe>
```"""


def test_html_in_an_answer_stays_text(chat: Chat, fake: Fake) -> None:
    fake.answers["write"] = EVIL
    chat.ask("write")
    chat.open()  # the kept answer, too
    made = chat("[...new Set([...document.querySelectorAll('.text *')].map((e) => e.localName))].sort()")
    assert made == ["code", "p", "pre", "strong"]
    shown = chat("document.querySelector('.text').innerText")
    assert '<img src=x onerror="' in shown and "<b onclick=x>bold</b>" in shown and "<iframe" in shown
    assert "[click](javascript:" in shown


def test_html_in_a_question_a_model_or_a_file_name_stays_text(chat: Chat, fake: Fake) -> None:
    chat.ask("<img src=x onerror=wrong.push(1)>")
    assert chat("document.querySelectorAll('#turns img').length") == 0
    assert chat("document.querySelector('.question').innerText") == "<img src=x onerror=wrong.push(1)>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        (
            "so:\n- a **b**\n  goes on\n- c\n\n3. d\n4) e",
            '<p>so:</p><ul><li>a <strong>b</strong> goes on</li><li>c</li></ul><ol start="3"><li>d</li><li>e</li></ol>',
        ),
        ("## Head\ntext", '<p class="heading">Head</p><p>text</p>'),
        (
            "*a* _b_ **c *d*** 2 * 3 * 4 snake_case_name",
            "<p><em>a</em> <em>b</em> <strong>c <em>d</em></strong> 2 * 3 * 4 snake_case_name</p>",
        ),
        ("`a*b*` and ``c`d``", "<p><code>a*b*</code> and <code>c`d</code></p>"),
        ("```py\nx = 1\n\n- y", '<pre tabindex="0" role="region" aria-label="Code"><code>x = 1\n\n- y</code></pre>'),
        ("", ""),
    ],
)
def test_a_little_markdown(chat: Chat, text: str, expected: str) -> None:
    made = chat(f"""import("/markdown.js").then(({{ rendered }}) => {{
        const holder = document.createElement("div");
        holder.append(rendered({json.dumps(text)}));
        return holder.innerHTML;
    }})""")
    assert made == expected
