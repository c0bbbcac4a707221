"""What of a pair depends on the chat template: ids of tool calls, and which fields of messages it shows."""

import dataclasses
import re
from functools import lru_cache

from mdpo.data.tool_calls import linked
from mdpo.errors import DropPair
from mdpo.masking.left_out import FIELDS
from mdpo.types import SIDES, Message, Pair

MADE_UP = "tool call ids that were made up, as the template writes them and the row has none"
REPLACED = "tool call ids that were replaced, as the template refuses the row's own"
MISSING = "tool calls without the ids that the template writes"
Sides = tuple[list[Message], list[Message]]


def fit(pair: Pair, template) -> Pair:
    """The pair with ids for its tool calls where the template cannot do without, thoughts that a message has twice
    once, and `unread` without the fields that the template shows. A pair that the template refuses stays as it is.
    Raises DropPair for two different thoughts of a message."""
    if isinstance(pair.chosen, str) or template is None:
        return pair
    source = str(template.tokenizer.chat_template)
    sides = {name: [_thoughts_once(m, i, source) for i, m in enumerate(getattr(pair, name))] for name in SIDES}
    pair = dataclasses.replace(pair, **sides)
    if any(m.get("tool_calls") for side in (pair.chosen, pair.rejected) for m in side) and _mentions(source, "id"):
        pair = _with_ids(pair, template)
    unread = [name for name in pair.unread if not (_reads(source, name) and _shows(name, pair, template))]
    return dataclasses.replace(pair, unread=unread)


def _thoughts_once(message: Message, i: int, source: str) -> Message:
    """A message whose content begins with the thoughts that a field has too, as some servers give both: without those
    of the content where the template knows such a field, else without the field."""
    thought, tag, visible = (message.get("content") or "").rpartition("</think>")
    own = "".join(thought.strip().removeprefix("<think>").split())
    fields = {name: "".join(message[name].split()) for name in FIELDS if isinstance(message.get(name), str)}
    if message["role"] != "assistant" or not (tag and own and fields):
        return message
    if other := [name for name, text in fields.items() if text != own]:
        raise DropPair(f"thoughts in the content and other ones in {other[0]} (message {i + 1})")
    if _reads(source, FIELDS[0]):
        return {**message, "content": visible.lstrip()}
    return {k: v for k, v in message.items() if k not in fields}


def _reads(source: str, name: str) -> bool:
    # transformers gives each field of thoughts under the others' names as well
    return any(_mentions(source, known) for known in (FIELDS if name in FIELDS else (name,)))


@lru_cache(maxsize=1024)
def _mentions(source: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source) is not None


def _texts(sides: Sides, pair: Pair, template) -> list[str] | None:
    """Both sides as the template writes them, None where it refuses one."""
    try:
        named = zip(SIDES, sides, strict=True)
        return [template.render(side, pair.side(name).tools, **pair.template_kwargs) for name, side in named]
    except DropPair:
        return None


def _shows(name: str, pair: Pair, template) -> bool:
    """Whether the template writes another text without a field, of the whole or, as it may leave out earlier thoughts,
    of what ends with a turn that has it. A tool message's `name` stays: its call has it too."""
    sides = (pair.chosen, pair.rejected)

    def without(message):
        kept = name == "name" and message["role"] == "tool"
        return message if kept else {k: v for k, v in message.items() if k != name}

    def differ(end: int | None) -> bool:
        with_it = tuple(side[:end] for side in sides)
        return _texts(with_it, pair, template) != _texts(tuple(map(bare, with_it)), pair, template)

    def bare(side: list[Message]) -> list[Message]:
        return [without(m) for m in side]

    ends = sorted({i + 1 for side in sides for i, m in enumerate(side) if i >= pair.n_prompt and name in m})
    return differ(None) or any(map(differ, ends))


def _with_ids(pair: Pair, template) -> Pair:
    """Ids are given where the template refuses the pair without, or finds a tool's call by them; not where it would
    only write them: the policy sampled others."""
    sides = (pair.chosen, pair.rejected)
    whole, strict = tuple(map(linked, sides)), tuple(linked(side, strict=True) for side in sides)
    if strict == sides:
        return pair
    own = _texts(sides, pair, template)
    if own is not None:
        texts = own if whole == sides else _texts(whole, pair, template)
        if texts in (None, own):
            return pair
        if _written(sides, whole, texts):
            return dataclasses.replace(pair, remarks=[*pair.remarks, MISSING])
        return dataclasses.replace(pair, chosen=whole[0], rejected=whole[1])
    for ids, remark in ((whole, MADE_UP), (strict, REPLACED)):
        texts = None if ids == sides else _texts(ids, pair, template)
        if texts is not None:
            remarks = [*pair.remarks, remark] if _written(sides, ids, texts) else pair.remarks
            return dataclasses.replace(pair, chosen=ids[0], rejected=ids[1], remarks=remarks)
    return pair


def _written(before: Sides, after: Sides, texts: list[str]) -> bool:
    """Whether the template writes an id of a call that `linked` gave."""
    both = zip((m for side in before for m in side), (m for side in after for m in side), strict=True)
    calls = (pair for a, b in both for pair in zip(a.get("tool_calls", ()), b.get("tool_calls", ()), strict=True))
    return any(new["id"] in text for old, new in calls if old.get("id") != new["id"] for text in texts)
