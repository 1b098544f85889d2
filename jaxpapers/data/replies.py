"""JSON out of replies of language models: strict, bounded, with LaTeX's backslashes."""

import json
import re
from typing import Any

MAX_CHARACTERS = 4_000_000
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\r?\n(.*?)```", re.DOTALL)
# A backslash that starts no escape of JSON, and those of \beta, \frac, \rho, \times.
_LONELY = re.compile(
    r'\\(?:(?=[bfrt][A-Za-z])|(?!["\\/bfnrtu]))|\\(?=u(?![0-9a-fA-F]{4}))'
)
# Commands of TeX that JSON reads as an escape and letters. Nobody means \b, \f or \r
# before a letter; \n and \t begin many lines, so theirs are named.
_COMMAND = re.compile(
    r"\\(?=[bfr][A-Za-z]|(?:"
    r"t(?:ag|an|anh|au|binom|ext(?:bf|it|rm|sf|tt|style|normal)?|frac|heta|"
    r"hickapprox|hicksim|herefore|ilde|imes|o|op|riangle(?:left|right|leq|geq)?|"
    r"woheadrightarrow)|"
    r"n(?:abla|atural|cong|e|earrow|eg|eq|ewline|geq|gtr|leftarrow|leq|olimits|onumber|"
    r"ot|otin|rightarrow|subseteq|u|warrow)"
    r")(?![A-Za-z]))"
)


def parse(text: str) -> Any:
    r"""The JSON value of a reply: the text itself, or its last fenced block.

    Single backslashes of LaTeX's commands are read as if they were doubled, also where
    JSON knows the escape ("\frac", "\theta"); so is every single backslash of a block
    that is no JSON.

    Args:
      text: the reply.

    Raises:
      ValueError: no JSON, more than one value, a key twice in an object, NaN, too long;
        the message says what a writer has to change.

    Example:
      >>> parse('Here it is:\n```json\n{"answer": "\\(x\\)"}\n```')
      {'answer': '\\(x\\)'}
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the reply has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}"
        )
    blocks = _FENCE.findall(text)
    source = (blocks[-1] if blocks else text).strip()
    if not source:
        raise ValueError("the reply is empty, expected JSON")
    pairs = _COMMAND.sub("\0", source.replace("\\\\", "\0"))
    try:
        return loads(pairs.replace("\0", "\\\\"))
    except json.JSONDecodeError as first:
        try:
            return loads(_LONELY.sub("\0", pairs).replace("\0", "\\\\"))
        except json.JSONDecodeError:
            raise ValueError(
                f"the reply is no JSON: {first.msg} at line {first.lineno}, column "
                f"{first.colno}; expected one JSON value, alone or in a ```json block"
            ) from None


def loads(text: str) -> Any:
    """JSON without duplicate keys, NaN and infinities, and not too deep.

    Raises:
      ValueError: any of these; ``json.JSONDecodeError`` for text that is no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} occurs twice in one object")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
