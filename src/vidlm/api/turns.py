"""The turns of a chat, one at a time, whichever threads ask."""

from __future__ import annotations

from threading import Condition, Thread, current_thread

from vidlm.errors import InvalidArgument

LOOK_AGAIN = 1.0  # seconds after which a waiting thread sees that the other has ended


class Turns:
    """Whose turn it is."""

    def __init__(self) -> None:
        # Its lock is reentrant: the garbage collector may end a turn while this thread begins one.
        self._condition = Condition()
        self._current: Turn | None = None

    def begin(self) -> Turn:
        """Wait for the turn of another thread to end, and begin one.

        Raises InvalidArgument where the turn under way is this thread's own, which would wait for
        itself, or of a thread that has ended without finishing it.
        """
        with self._condition:
            while (current := self._current) is not None:
                if current.thread is current_thread() or not current.thread.is_alive():
                    raise InvalidArgument(
                        "the stream of the last question is not finished; read it to its end or "
                        "close() it, then ask the next one"
                    )
                self._condition.wait(LOOK_AGAIN)
            self._current = Turn(self)
            return self._current

    def end(self, turn: Turn) -> None:
        """Let the next turn begin. No effect where `turn` has ended already."""
        with self._condition:
            if self._current is turn:
                self._current = None
                self._condition.notify_all()


class Turn:
    """A question and its answer, from `Turns.begin` to `end`; of the thread that advances it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.thread: Thread = current_thread()

    def take(self) -> None:
        """This thread advances the turn from now on."""
        self.thread = current_thread()

    def end(self) -> None:
        self._turns.end(self)
