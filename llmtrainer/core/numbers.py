"""Numbers as people and models write them, read exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from llmtrainer.core.answer_text import narrow

LONGEST = 400
"""Characters of a number; more is no answer, and takes time to read."""

_GROUPED = r"\d{1,3}(?:,\d{3})+"
_PLAIN = rf"(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+"
_SCIENCE = r"(?:[eE][+-]?\d{1,3}(?![\w.]))?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+])?(?:(?P<whole>\d+)[ ]+(?=\d+[ ]?/[ ]?\d))?(?P<top>(?:{_PLAIN}){_SCIENCE})"
    rf"(?:[ ]?/[ ]?(?P<bottom>{_PLAIN}))?(?P<times>[\u4e07\u4ebf])?[ ]?(?P<percent>%)?"
)
_LENGTH = (
    r"\s+m|\s*(?:mm|cm|dm|km|ft|in|yd|mi|inch(?:es)?|f(?:oo|ee)t|yards?|miles?|(?:centi|kilo|milli)?met(?:er|re)s?|units?"
    r"|\u7c73|\u5398\u7c73)"
)
"""A unit whose square or cube is one too."""
_FUNCTION = (
    r"\\(?:sqrt|neq?|not|[gl]eq?|[gl]eqslant|[gl]t|pm|mp|sin|cos|tan|log|ln|exp|min|max|lfloor|lceil|binom|cdot|times|div|"
    r"pi|infty|theta|alpha|beta|gamma|phi)(?![A-Za-z])"
)
_BEFORE = re.compile(
    r"[A-Za-z0-9.^_/]\Z|\d:\Z|[A-Za-z0-9)]\s*\^\s*\{?\Z|\d\s*,\Z"
    rf"|{_FUNCTION}\s*(?:\[[^\]]*\]\s*)?[{{(]?\s*\Z|[\u00b1\u2213\u221a\u2260\u2264\u2265\u00d7\u03c0\u221e]\s*\(?\s*\Z|(?<![-=])[<>]\s*\Z"
    r"|[<>!]=\s*\Z|[-+*/]\s*[({\[]+\s*\Z|[\d)]\s*\*\s*\Z|(?<![A-Za-z])[A-Za-z]\(\s*\Z"
    r"|\\frac\s*\{[^{}]*(?:\}\s*\{[^{}]*)?\Z"
    r"|(?:\\infty|\u221e)\s*,\s*\Z|(?i:\bnot|\bnever|n't)\s+\Z|(?:\u4e0d\u662f|\u4e0d\u7b49\u4e8e|\u5e76\u975e)\s*\Z"
)
"""What makes the number behind it a part of something else: a name, a power, a date, a time, a root, an inequality; or
says that it is not this number."""
_AFTER = re.compile(
    r"[.,:/^_]?\d|\s*\^|_|\s*/\s*[A-Za-z0-9]|\s*\*\s*10|\s*[x\u00d7]\s*10\s*\^|[eE]\d|!"
    r"|\s*[-+*/]\s*[b-zB-HJ-Z](?![A-Za-z])|\s?\(\s*[a-z]\s*[-+*/^)]|\s*[<>]=?\s*[A-Za-z0-9\\](?![A-Za-z])|\s*pi\b"
    r"|\s*(?i:hundred|thousand|million|billion|trillion)|\s*[\u5341\u767e\u5343]"
    rf"|\s*{_FUNCTION}|\s*[\u03c0\u221a\u00b1\u221e]|[einkpqruw](?![A-Za-z])|\s?[xyz](?![A-Za-z])|\s*,\s*[-+]?\s*(?:\\infty|\u221e)"
)
_TIMES = {"\u4e07": 10_000, "\u4ebf": 100_000_000}

_DIGITS = {digit: place for place, digit in enumerate("\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d")}
_DIGITS |= {"\u3007": 0, "\u4e24": 2}
_UNITS = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
_CHINESE = "".join([*_DIGITS, *_UNITS, *_TIMES])
_CHINESE_NUMBER = re.compile(
    rf"(?P<sign>\u8d1f)?(?:(?P<percent>\u767e\u5206\u4e4b)|(?P<bottom>[{_CHINESE}]+)\u5206\u4e4b)?"
    rf"(?P<top>[{_CHINESE}]+)(?:\u70b9(?P<decimals>[{''.join(_DIGITS)}]+))?"
)


@dataclass(frozen=True)
class Number:
    """A number that a text states."""

    value: Fraction
    percent: bool = False
    """Whether a percent sign stands behind it; it is not part of `value`."""
    end: int = 0
    """Where it ends in the cleaned text that it was found in."""


def cleaned(text: str) -> str:
    """ASCII digits, plain minus signs, no decoration: what LaTeX and typography put between the digits is gone."""
    # Powers and indices, before they look like digits of the number in front.
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+", r"^\g<0>", text)
    text = re.sub("[\u2080-\u2089]+", r"_\g<0>", text)
    # A half is 1/2 and behind a whole number a part of it, not more of its digits.
    text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
    text = narrow(text).replace("\u2044", "/").replace("\u2212", "-").replace("\u2013", "-").replace("\\%", "%")
    text = re.sub(r"\\[dt]?frac", r"\\frac", text)
    text = re.sub(r"(?<=\d)\s*\^\s*(?:\{\s*)?\\circ(?:\s*\})?|(?<=\d)\s*\u00b0", " ", text)
    text = re.sub(r"(?<=[-+])\\?\$(?=[\d.])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?i)\b(?:minus|negative)\s+(?=\.?\d)|\u8d1f\s*(?=\.?\d)", "-", text)
    text = re.sub(rf"(?<=\d)({_LENGTH})\s*\^\s*(?:\{{\s*[23]\s*\}}|[23](?!\d))", r"\1 ", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d{3}(?!\d))", ",", text).replace(",\\!", ",")
    text = re.sub(r"(?<=\d),\s?\\,?(?=\d{3}(?!\d))", ",", text)
    # Behind a sign without a blank between, so that the sign stays the number's.
    text = re.sub(rf"()\\frac\s*\{{?\s*(-?(?:{_PLAIN}))\s*\}}?\s*\{{\s*(-?(?:{_PLAIN}))\s*\}}", _fraction, text)
    text = re.sub(r"()\\frac\s*(\d)\s*(\d)", _fraction, text)
    return re.sub(r"\$|\*\*|\\left|\\right|\\[,;:! ]|~|`", " ", text)


def _fraction(match: re.Match[str]) -> str:
    signed = match.start() > 0 and match.string[match.start() - 1] in "-+"
    top, bottom = match[2], match[3]
    if bottom.startswith("-"):
        top, bottom = top[1:] if top.startswith("-") else f"-{top}", bottom[1:]
    return f"{'' if signed else ' '}{top}/{bottom} "


def only_number(region: str) -> Number | None:
    """The number of a region that states one: `$1,200`, `-3/4 cups`, `12%`, Chinese numerals. None where it states
    none, or several different ones, so that nobody can try his luck twice."""
    region = cleaned(region)[: LONGEST * 4]
    found = [_number(match, region) for match in _NUMBER.finditer(region)]
    known = {(number.value, number.percent) for number in found if number is not None}
    if None in found or len(known) > 1:
        return None
    if known:
        return found[0]
    return _chinese(region)


def last_number(text: str) -> Number | None:
    """The last number in ASCII digits of a text. None where it is part of something else, as in `10^3` or `12:30`."""
    text = cleaned(text)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _number(last, text)


def _number(match: re.Match[str], text: str) -> Number | None:
    before, after = text[max(0, match.start() - 24) : match.start()], text[match.end() : match.end() + 16]
    sign = match["sign"]
    # `5-3`, `5 -3`, `x-3` and `3 - 2`: a sign behind a number or a name is an operation; in `is -3` it is none.
    if (sign and re.search(r"[A-Za-z0-9)\]+-]\Z|[\d)\]]\s+\Z", before)) or re.search(r"[-+*/]\s+\Z", before):
        return None
    if len(match[0]) > LONGEST or (_BEFORE.search(before) and not sign) or _AFTER.match(after):
        return None
    if re.match(r"a(?![A-Za-z.])", after) and not match[0].endswith(" "):     # `42a`, and not `42 a month`
        return None
    value = _plain(match["top"])
    if match["bottom"]:
        bottom = _plain(match["bottom"])
        if bottom == 0:
            return None
        value = value / bottom
    value += _plain(match["whole"]) if match["whole"] else 0
    value *= _TIMES.get(match["times"] or "", 1)
    return Number(-value if sign == "-" else value, match["percent"] is not None, match.end())


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "") if not text.startswith(".") else "0" + text)


def chinese_number(text: str) -> Number | None:
    """The number of a text that is nothing but Chinese numerals, and a full stop perhaps."""
    bare = cleaned(text).strip().rstrip(".\u3002")
    return _chinese(bare) if _CHINESE_NUMBER.fullmatch(bare) else None


def _chinese(region: str) -> Number | None:
    found = [match for match in _CHINESE_NUMBER.finditer(region)]
    if len(found) != 1:
        return None
    match = found[0]
    top, bottom = _integer(match["top"]), _integer(match["bottom"] or "\u4e00")
    if top is None or bottom is None or bottom == 0:
        return None
    decimals = "".join(str(_DIGITS[digit]) for digit in match["decimals"] or "")
    value = (top + (Fraction(int(decimals), 10 ** len(decimals)) if decimals else 0)) / Fraction(bottom)
    return Number(-value if match["sign"] else value, match["percent"] is not None, match.end())


def _integer(text: str) -> Fraction | None:
    """Chinese numerals, by place (one zero three) or by unit (a hundred, three)."""
    if all(letter in _DIGITS for letter in text):
        return Fraction(int("".join(str(_DIGITS[letter]) for letter in text)))
    total, section, digit = 0, 0, None
    for letter in text:
        if letter in _DIGITS:
            if digit not in (None, 0):
                return None
            digit = _DIGITS[letter]
        elif letter in _UNITS:
            section += (1 if digit is None else digit) * _UNITS[letter]
            digit = None
        else:
            total = (total + section + (digit or 0)) * _TIMES[letter]
            section, digit = 0, None
    return Fraction(total + section + (digit or 0))
