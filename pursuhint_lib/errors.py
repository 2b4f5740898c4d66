"""Errors in one line."""

import re


def first_line(error: BaseException | str) -> str:
    """The first line of a text that says something, without a terminal's colors; of an error that has no text, its
    kind.
    """
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[0] if lines else "" if isinstance(error, str) else type(error).__name__)[:1000]
