"""Any XML document: odd blanks, quotes, comments, CDATA, processing instructions."""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "disk", "source", "os"])
DATA = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), max_size=6)
BLANKS = st.sampled_from(["", " ", "\n", "\r\n\t"])


def quoted(value: str, quote: str) -> str:
    return (
        quote
        + value.replace("&", "&amp;").replace("<", "&lt;").replace(quote, "&#39;" if quote == "'" else "&quot;")
        + quote
    )


@st.composite
def attributes(draw: st.DrawFn) -> str:
    given = draw(st.dictionaries(st.sampled_from(["x", "y", "z"]), DATA, max_size=3))
    parts = []
    for name, value in given.items():
        space, quote = draw(st.sampled_from(["", " "])), draw(st.sampled_from("'\""))
        parts.append(f" {draw(BLANKS)}{name}{space}={space}{quoted(value, quote)}")
    return "".join(parts)


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> str:
    name = draw(NAMES)
    if depth == 0 or draw(st.booleans()):
        return f"<{name}{draw(attributes())}{draw(BLANKS)}/>"
    pieces = st.one_of(
        DATA.map(lambda text: text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")),
        DATA.map(lambda text: f"<!--{text.replace('-', '')}-->"),
        DATA.map(lambda text: f"<![CDATA[<{text.replace(']', '')}>]]>"),
        DATA.map(lambda text: f"<?p {text.replace('?', '')}>?>"),
        elements(depth - 1),
    )
    return f"<{name}{draw(attributes())}>{''.join(draw(st.lists(pieces, max_size=4)))}</{name}{draw(BLANKS)}>"
