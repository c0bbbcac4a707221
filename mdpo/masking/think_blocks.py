"""What a generation prompt supplies of a turn, and the empty think blocks that templates write."""

import re
from contextlib import suppress

from mdpo.errors import DropPair
from mdpo.masking.conversation import Conversation
from mdpo.masking.stops import EMPTY_THINK, THINK_PREFIX
from mdpo.types import common_prefix

REST_OF_EMPTY_THINK = re.compile(r"\s*</think>\s*")


def think_block(tail: str, n: int, usual: str) -> tuple[int, bool, str]:
    """Where an empty think block ends that begins at `n`, or whose opening is before `n`; whether that is the case; and
    that opening. `usual` is the block as the template supplies it: white space behind it is the policy's."""
    opening = THINK_PREFIX.search(tail[:n])
    begin = n if opening is None else opening.start()
    if opening is not None and not REST_OF_EMPTY_THINK.match(tail, n):
        return n, False, ""
    block = EMPTY_THINK.match(tail, begin)
    if block is None:
        return n, False, ""
    end = begin + len(usual) if usual and tail.startswith(usual, begin) else block.end()
    return end, opening is not None, tail[begin:n]


def supplied(tail: str, supply: str, ahead: int) -> tuple[int | None, str]:
    """How many characters of `tail` the generation prompt `supply` stands for, white space aside, and what of it is
    missing there: a think prefix that history leaves out, or another one, if the content, `ahead` characters on,
    follows at once."""
    bare = THINK_PREFIX.sub("", supply)
    for known in dict.fromkeys((supply, bare)):
        n = len(known) if tail.startswith(known) else _loosely(tail, known)
        if n is not None:
            return n, supply[len(known) :]
    n = min(common_prefix(tail, supply), ahead)
    return (None, "") if tail[n:ahead].strip() else (n, supply[n:])


def _loosely(tail: str, known: str) -> int | None:
    """Where `known` ends in `tail` if that begins with it but for white space."""
    n = 0
    for c in known:
        if c.isspace():
            continue
        while n < len(tail) and tail[n].isspace():
            n += 1
        if tail[n : n + 1] != c:
            return None
        n += 1
    return n + common_prefix(tail[n:], known[len(known.rstrip()) :])


def unsupplied_block(conversation: Conversation) -> bool:
    """Whether the template writes an empty think block before a last turn without thoughts, of which its generation
    prompt has nothing: Qwen3 unless enable_thinking is false. Found once for each row's `chat_template_kwargs`."""
    template, kwargs = conversation.template, conversation.kwargs
    key = repr(sorted(kwargs.items()))
    if key not in template.unsupplied_blocks:
        turns = [{"role": "user", "content": "Qz4"}, {"role": "assistant", "content": "Qz3"}]
        found = False
        with suppress(DropPair):
            supply = template.render(turns[:1], generation=True, **kwargs).rpartition("Qz4")[2]
            tail = template.render(turns, **kwargs).rpartition("Qz4")[2]
            n, _ = supplied(tail, supply, tail.find("Qz3"))
            found = n is not None and not THINK_PREFIX.search(tail[:n]) and EMPTY_THINK.match(tail, n) is not None
        template.unsupplied_blocks[key] = found
    return template.unsupplied_blocks[key]
