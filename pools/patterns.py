"""Patterns of tensor names: shell globs, and regular expressions where those do not suffice."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable


class PatternError(ValueError):
    """A pattern that cannot be read."""


@functools.lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    r"""Whether a name fits a pattern: a shell glob on the whole name, or `re:` and a regular expression found anywhere.

    Raises:
        PatternError: The regular expression cannot be read.

    >>> matcher("*.mlp.*")("layers.0.mlp.weight"), matcher("re:^layers\\.[02]\\.")("layers.1.mlp.weight")
    (True, False)
    """
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise PatternError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    return lambda name: expression.search(name) is not None
