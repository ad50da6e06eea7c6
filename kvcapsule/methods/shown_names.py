"""Names of methods as tables and pictures show them, and as they may be typed.

The codec family of the paper KVCapsule (arXiv 2605.16439) is called `kvcapsule` in files and results, as this package
is: a reader would take its row for that of the whole tool. Tables say what it is, a subset of the tokens.
"""

import re

_FAMILY, _KIND = "kvcapsule", "token-subset"
ALIASES = {_KIND: _FAMILY}
"""Names that are accepted beside those of files and results."""
_IN_A_NAME = re.compile(rf"(?<![\w:/-]){_FAMILY}(?![\w/])")


def shown_name(name: str) -> str:
    """A row's or a family's name for a reader: `kvcapsule-5x+int4` is `token-subset-5x+int4`, and the family alone is
    `token-subset (KVCapsule)`."""
    return f"{_KIND} (KVCapsule)" if name == _FAMILY else _IN_A_NAME.sub(_KIND, name)


def known_name(name: str) -> str:
    """The name in files and results of what was typed."""
    return ALIASES.get(name, name)
