"""Why a side goes on in a new sequence: what its next prompt has of the turns before it."""

from typing import TYPE_CHECKING

from mdpo.masking.conversation import Conversation, Marked
from mdpo.masking.left_out import lost, thoughts
from mdpo.masking.sentinels import numbered
from mdpo.types import common_prefix

if TYPE_CHECKING:
    from mdpo.masking.sequences import RenderedSequence

EARLIER_THOUGHTS = "earlier thoughts left out by the template"
THINK_BLOCK = "the generation prompt's think block left out of the history"
SYSTEM_MOVED = "system message moved"
OTHER_STOP = "another end of turn in the history"
RETOKENIZED = "a turn's edge inside a token of the history"
WHITE_SPACE = "other white space in the history"
REWRITTEN = "text rewritten at"


def why(before: "RenderedSequence", prompt: Marked, conversation: Conversation) -> str:
    """Why the ids of `prompt` do not begin with those of the sequence `before` it."""
    same, turn = common_prefix(before.text, prompt.text), before.turns[-1]
    if same == len(before.text):
        return RETOKENIZED
    earlier = ((i, thoughts(conversation.messages[i])) for i in range(turn.message + 1))
    if any(lost(own, i, prompt, conversation) for i, own in earlier):
        return EARLIER_THOUGHTS
    if same >= turn.end - len(turn.stop):
        return OTHER_STOP
    systems = [b for a, b, i in prompt.marks.contents() if conversation.messages[i]["role"] == "system"]
    if any(b > same for b in systems):
        return SYSTEM_MOVED
    tag = max(before.text.rfind("<", same - 6, same), 0)  # a call's begins with the same letters
    if any("".join(before.text[n:].split())[:7] in ("<think>", "</think") for n in (same, tag)):
        return THINK_BLOCK
    old, new = ("".join(text.split()) for text in (before.text, prompt.text))
    if new.startswith(old):
        return WHITE_SPACE
    pieces = [(end, i) for _, end, i in before.contents] + [(turn.end, turn.message) for turn in before.turns]
    return f"{REWRITTEN} {numbered(min(piece for piece in pieces if piece[0] > same)[1])}"
