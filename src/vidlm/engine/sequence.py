"""What scheduler and engine tell each other: sequences, their share of a step, limits, counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vidlm.engine.blocks import PoolStats, Span
from vidlm.errors import InvalidArgument


@dataclass(eq=False)
class Sequence:
    """One answer under way. A request for n answers has n of them.

    Generated text is shared too (the next turn of a chat begins with it) if every full block of
    the prompt has a key, `tail` holds the prompt's last ids, and `root` is given where the prompt
    is shorter than a block.
    """

    id: int
    prompt: int  # tokens
    budget: int  # new tokens it may get
    keys: tuple[bytes, ...] = ()  # of the prompt's full blocks; () if nothing of it may be shared
    encoded: bool = True  # features of its media are there, or it has none
    blocks: list[int] = field(default_factory=list)  # its table; empty while it waits
    computed: int = 0  # tokens whose keys and values are stored
    length: int = 0  # prompt and generated tokens; the newest of these is not computed yet
    tail: list[int] = field(default_factory=list)  # ids behind the prompt's last full block
    root: bytes | None = None  # that of `keys`
    media: tuple[Span, ...] = ()  # the prompt's; needed are those that reach behind `keys`
    continues: bool = True  # whether generated text, too, may be shared
    pinned: bool = False  # never preempted
    reserve: int = 0  # of a pinned one: blocks kept for its forks
    # Kept by the scheduler
    matched: int = 0  # tokens found stored, which it did not compute
    chain: list[bytes] = field(default_factory=list)  # `keys`, and those of generated text
    arrival: tuple[int, int] = (0, 0)  # forks come behind what they are forked from

    def __post_init__(self) -> None:
        self.length = self.length or self.prompt
        self.chain = self.chain or list(self.keys)

    @property
    def decoding(self) -> bool:
        """Whether all is computed but the newest token, which was generated."""
        return self.length > self.prompt and self.computed == self.length - 1


@dataclass(frozen=True)
class Work:
    """A sequence's share of a step: its tokens [start, stop) are computed."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether its next token follows. False while a prompt, or an answer, is recomputed."""
        return self.stop == self.sequence.length


@dataclass(frozen=True)
class Plan:
    """One step. A sequence is in it once at most, and always decoded if it is decoding.

    encode     encode one chunk of this one's media; no blocks needed
    prefill    several tokens each, or one that is recomputed
    decode     one token each
    preempted  lost their blocks and wait again; prompt and generated tokens will be recomputed.
               If the features of one are gone, set its `encoded` to False.
    """

    encode: Sequence | None = None
    prefill: tuple[Work, ...] = ()
    decode: tuple[Work, ...] = ()
    preempted: tuple[Sequence, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much at once.

    max_sequences  admitted together; forks come on top
    chunk          tokens prefilled in a step, of all sequences
    idle_chunk     the same of a step in which no answer waits for its next token; None: chunk
    share          whether to use and publish blocks by prefix
    grid           every token in the same shape as if its sequence ran alone: a Work is one cell of
                   `grid` tokens (less at a prompt's end) or one generated token, and only whole
                   cells of prompts are shared. A cell is computed even where chunk is smaller.
    """

    max_sequences: int = 64
    chunk: int = 512
    share: bool = True
    grid: int | None = None
    idle_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "chunk", "grid", "idle_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} is {value}; give 1 or more")


@dataclass(frozen=True)
class SchedulerStats:
    """Sequences by state, and blocks."""

    waiting: int
    running: int
    preempted: int  # times, since the beginning
    reserved: int  # blocks kept aside for pinned sequences
    pool: PoolStats


class NeverFits(ValueError):
    """Prompt and answer need more blocks than there are."""

    def __init__(self, needed: int, count: int) -> None:
        super().__init__(f"{needed} blocks are needed, there are {count}")
        self.needed = needed
        self.count = count
