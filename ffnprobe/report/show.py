"""How is a value written for people, when it may come from a hostile corpus, vocabulary or name?"""

import re
from collections.abc import Sequence
from math import floor, isfinite, log10

# Controls, surrogates and invisible format characters: they move a terminal's cursor, reorder a line or break
# UTF-8. The joiners U+200C and U+200D stay, because Persian, Hindi and emoji are written with them.
HOSTILE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
MARKS = {"\n": "⏎", "\t": "⇥"}


def visible(text: str) -> str:
    r"""The text with each character that could act, or hide, written out.

    >>> print(visible("a\x1b[2J\u202eb\n"))
    a\x1b[2J\u202eb⏎
    """
    return HOSTILE.sub(lambda c: MARKS.get(c[0]) or c[0].encode("unicode_escape").decode(), text)


def show(value: object) -> str:
    """A number in about four digits, a text with its controls visible, a list with commas.

    >>> show(327.4567), show(0.00012345), show(30412.7), show(None), show([1, True])
    ('327.5', '0.0001234', '30413', '–', '1, yes')
    """
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
        case dict():
            return ", ".join(f"{show(key)}: {show(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(map(show, value))
        case _:
            return visible(str(value))


def show_column(values: Sequence[object]) -> list[str]:
    """A table's column: floats with the same number of decimals, unless that would make one of them 0.

    >>> show_column([327.4567, 1.02, None]), show_column([0.5, 1e-7])
    (['327.5', '1.0', '–'], ['0.5', '1e-07'])
    """
    sizes = [abs(value) for value in values if isinstance(value, float) and isfinite(value) and value]
    if not sizes or max(sizes) >= 1e9:
        return [show(value) for value in values]
    decimals = max(0, 3 - floor(log10(max(sizes))))
    if decimals > 6 or min(sizes) < 0.5 * 10**-decimals:
        return [show(value) for value in values]
    return [f"{value:.{decimals}f}" if isinstance(value, float) else show(value) for value in values]
