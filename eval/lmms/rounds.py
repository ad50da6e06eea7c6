"""The rounds of a multi-round task: after each answer the task says what is asked next."""

from collections.abc import Callable, Mapping
from typing import Any


class Rounds:
    """One question of a task of several rounds, with the answers so far."""

    def __init__(self, row: Mapping[str, Any], to_messages: Callable[..., Any]) -> None:
        """Begin.

        Args:
            row: of the data set.
            to_messages: the task's doc_to_messages; from the second round on it returns the messages, whether the task
                has ended, and two values of its own.
        """
        self.row, self.to_messages = row, to_messages
        self.answers: list[str] = []
        self._info: Any = None

    def messages(self) -> Any:
        """Those of the next round, which is a prompt of its own; None: the task has ended."""
        if not self.answers:
            return self.to_messages(self.row)
        returned = self.to_messages(
            self.row,
            round_idx=len(self.answers),
            previous_output=list(self.answers),
            previous_round_info=self._info,
        )
        if not isinstance(returned, tuple) or len(returned) != 4:
            return None
        messages, ended, _, self._info = returned
        return None if ended else messages
