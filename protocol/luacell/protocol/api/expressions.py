"""Variant values: `1`, `0x80`, `0b101`, `Read | Write`, `1 << 4`, `~Read & …` without the `&`, parentheses.

    or     = shift { "|" shift }
    shift  = unary { "<<" unary }
    unary  = "~" unary | number | variant | "(" or ")"

`~` complements within the enum's repr. Precedence is that of C. It evaluates; who asks knows where the text stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Final

from luacell.protocol.api.model import EXPRESSION_MAX, PARENTHESES_MAX, Scalar

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>0[xX][0-9A-Fa-f]+|0[bB][01]+|[0-9]+)(?![0-9A-Za-z_])|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign><<|[|~()])|(?P<end>$))"
)
_SHOWN_MAX: Final = 20  # characters of what was not understood


class ExpressionError(ValueError):
    """A variant's value is no expression, or is out of range.

    Attributes:
        offset: characters into the expression.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def evaluate(text: str, variants: Mapping[str, int], holder: Scalar) -> int:
    """Return the value of a variant's expression.

    Args:
        text: the expression.
        variants: the earlier variants of the enum.
        holder: the enum's repr.

    Raises:
        ExpressionError: says what is wrong and where.
    """
    if len(text) > EXPRESSION_MAX:
        raise ExpressionError(f"an expression of {len(text)} characters; the limit is {EXPRESSION_MAX}", 0)
    return _Evaluation(text, variants, holder).result()


class _Evaluation:
    def __init__(self, text: str, variants: Mapping[str, int], holder: Scalar) -> None:
        self._text = text
        self._variants = variants
        self._holder = holder
        self._open = 0
        self._advance(0)

    def result(self) -> int:
        value = self._union()
        if self._kind != "end":
            raise self._unexpected("an operator (| or <<) or the end")
        return value

    def _advance(self, at: int) -> None:
        match = _TOKEN.match(self._text, at)
        if match is None or match.lastgroup is None:
            start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
            shown = self._text[start : start + _SHOWN_MAX]
            raise ExpressionError(f"{shown!r} is no number, variant or operator", start)
        self._kind = match.lastgroup
        self._token = match[self._kind]
        self._start = match.start(self._kind)
        self._end = match.end()

    def _accept(self, token: str) -> bool:
        if self._kind == "sign" and self._token == token:
            self._advance(self._end)
            return True
        return False

    def _union(self) -> int:
        value = self._shift()
        while self._accept("|"):
            value |= self._shift()
        return value

    def _shift(self) -> int:
        value = self._unary()
        start = self._start
        while self._accept("<<"):
            count_start, count = self._start, self._unary()
            if count >= 8 * self._holder.size:
                raise ExpressionError(
                    f"shifts by {count}; {self._holder.name} has {8 * self._holder.size} bits", count_start
                )
            value = self._checked(value << count, start)
        return value

    def _unary(self) -> int:
        complements = 0
        while self._accept("~"):
            complements += 1
        value = self._primary()
        return value ^ self._holder.high if complements % 2 else value

    def _primary(self) -> int:
        kind, token, start = self._kind, self._token, self._start
        if kind == "number":
            self._advance(self._end)
            return self._checked(int(token, _base(token)), start)
        if kind == "name":
            self._advance(self._end)
            return self._variant(token, start)
        if not self._accept("("):
            raise self._unexpected("a number, an earlier variant, ~ or (")
        self._open += 1
        if self._open > PARENTHESES_MAX:
            raise ExpressionError(f"more than {PARENTHESES_MAX} parentheses are open", start)
        value = self._union()
        if not self._accept(")"):
            raise self._unexpected("a closing parenthesis")
        self._open -= 1
        return value

    def _variant(self, name: str, start: int) -> int:
        value = self._variants.get(name)
        if value is None:
            close = difflib.get_close_matches(name, self._variants, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ExpressionError(f"{name!r} is no earlier variant{hint}", start)
        return value

    def _checked(self, value: int, start: int) -> int:
        if value > self._holder.high:
            raise ExpressionError(f"{value:#x} is outside 0..{self._holder.high:#x} of {self._holder.name}", start)
        return value

    def _unexpected(self, wanted: str) -> ExpressionError:
        found = repr(self._token) if self._token else "the end"
        return ExpressionError(f"{found} in place of {wanted}", self._start)


def _base(token: str) -> int:
    return {"0x": 16, "0b": 2}.get(token[:2].lower(), 10)
