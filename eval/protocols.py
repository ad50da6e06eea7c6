"""The protocols of an evaluation: whether a question is read with the image or after the image is compressed."""

from .ask_first import AskFirst
from .ask_later import AskLater
from .protocol_names import ASK_FIRST, ASK_LATER

PROTOCOLS: dict[str, type[AskFirst] | type[AskLater]] = {ASK_FIRST: AskFirst, ASK_LATER: AskLater}
"""By the name of --protocol: its blocks of questions."""
