"""Both sides of a pair as sequences of token ids: from messages, as they were recorded, or by TRL's rule."""

from dataclasses import dataclass, field
from functools import partial
from typing import cast

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.recorded import (
    REPEATED,
    compared,
    recorded_fields,
    refuse_other_prompts,
    refuse_unknown_ids,
    repeated,
)
from mdpo.masking.sequences import NO_REASONING, UNSUPPLIED, RenderedSide, side_sequences
from mdpo.masking.spans import tokenize
from mdpo.types import SIDES, Message, Pair, common_prefix, split

ALL_MASKED = "nothing to learn of a side: turns_without_reasoning: mask leaves out all of its turns"
ENDS = "end-of-turn tokens inside trained answers: take them out, the template writes one behind each"


@dataclass
class Side:
    """Sequences of one side: `ids`, `mask` and `weights` have them one behind the other, a number a token each, and
    `lengths` the tokens of each. `breaks` says why each sequence after the first one begins."""

    ids: list[int]
    mask: list[int]
    weights: list[float]
    lengths: list[int]
    breaks: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[tuple[list[int], list[int], list[float]]]:
        return list(zip(*(split(x, self.lengths) for x in (self.ids, self.mask, self.weights)), strict=True))


@dataclass
class RenderSettings:
    """What decides ids and masks. With `mask_turns` False, TRL's rule: everything after the prompt is supervised."""

    max_length: int | None
    truncation_mode: str = "drop"  # drop: over-long pairs are dropped; keep_start: cut at the end, as TRL does
    mask_turns: bool = True
    template_kwargs: dict = field(default_factory=dict)
    different_prompts: bool = False  # also pairs whose sides have a prompt each
    turns_without_reasoning: str = "keep"  # keep, mask, drop
    pair_weights: bool = True  # whether a row's `weight` is read; TRL has none

    @classmethod
    def of(cls, args) -> "RenderSettings":
        """From an MDPOConfig."""
        return cls(args.max_length, args.truncation_mode, args.mask_user_turns, pair_weights=not args.of_trl)


def conversations(pair: Pair) -> tuple[list[Message], list[Message]]:
    return cast(tuple[list[Message], list[Message]], (pair.chosen, pair.rejected))  # no plain texts


def turn_sides(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> tuple[list[Side], list[str]]:
    """Both sides by turns, and remarks."""
    conversations = [_conversation(pair, name, template) for name in SIDES]
    _refuse_over_long(conversations, settings)
    sides, remarks = zip(*map(partial(_of_turns, settings), conversations, pair.weights), strict=True)
    return list(sides), [remark for of_side in remarks for remark in of_side]


def _conversation(pair: Pair, name: str, template: ChatTemplate) -> Conversation:
    messages = conversations(pair)[SIDES.index(name)]
    return Conversation(messages, pair.n_prompt, template, pair.side(name).tools, pair.template_kwargs)


def _of_turns(settings: RenderSettings, conversation: Conversation, turn_weights: list[float]) -> tuple[Side, list]:
    """A side, and remarks."""
    rendered = side_sequences(conversation)
    turns = [turn for sequence in rendered.sequences for turn in sequence.turns]
    learned = [turn for turn in turns if not turn_weights or turn_weights[turn.message]]
    lacking = [NO_REASONING] * any(turn.opened for turn in learned)
    lacking += [UNSUPPLIED] * any(turn.unsupplied for turn in learned)
    if lacking and settings.turns_without_reasoning == "drop":
        raise DropPair(lacking[0])
    if lacking and settings.turns_without_reasoning == "mask" and all(turn.lacks_reasoning for turn in learned):
        raise DropPair(ALL_MASKED)
    inside = [ENDS] * _ends_inside(rendered, conversation)
    return _side(rendered, turn_weights, settings), rendered.remarks + lacking + inside


def _refuse_over_long(conversations: list[Conversation], settings: RenderSettings) -> None:
    """Before turns are located, which is the most work for long conversations."""
    if settings.truncation_mode != "drop" or settings.max_length is None:
        return
    # A character is a token at most, but for bytes.
    texts = [c.text for c in conversations]
    if max(len(text.encode()) for text in texts) <= settings.max_length:
        return
    longest = _longest(conversations, texts)
    if longest <= settings.max_length:
        return
    # The whole text may be longer than each sequence, by what the template writes behind the last turn.
    prompts = [c.render(c.messages[: max(c.trained, default=0)], generation=True) for c in conversations]
    if _longest(conversations, prompts) > settings.max_length:
        reason = DropPair("over-long")
        reason.longest = longest
        raise reason


def _longest(conversations: list[Conversation], texts: list[str]) -> int:
    return max(len(tokenize(text, conversations[0].template.tokenizer)[0]) for text in texts)


def _side(rendered: RenderedSide, turn_weights: list[float], settings: RenderSettings) -> Side:
    side = Side([], [], [], [], [sequence.why for sequence in rendered.sequences[1:]])
    for sequence in rendered.sequences:
        weights = [1.0] * len(sequence.ids)
        for turn in sequence.turns:
            weight = turn_weights[turn.message] if turn_weights else 1.0
            if turn.lacks_reasoning and settings.turns_without_reasoning == "mask":
                weight = 0.0
            for t in sequence.tokens_of(turn) if weight != 1.0 else ():
                weights[t] = weight if sequence.mask[t] else 1.0
        side.ids += sequence.ids
        side.mask += sequence.mask
        side.weights += weights
        side.lengths.append(len(sequence.ids))
    return side


def recorded_sides(pair: Pair, template, settings: RenderSettings) -> tuple[list[Side], list[str], list[int]]:
    """Sides of which one at least is recorded, remarks, and of each recorded side that its messages are rendered
    otherwise than, how many tokens differ."""
    sides, remarks, retokenized = list[Side](), list[str](), list[int]()
    for name, own in zip(SIDES, pair.recorded, strict=True):
        if own is None:
            side, said = _rendered_side(pair, name, template, settings)
            remarks += said
        else:
            refuse_unknown_ids(own, name, template.tokenizer)
            side, remarks = Side(*recorded_fields(own)), remarks + [REPEATED] * repeated(own)
        if own is not None and own.compared:
            said, tokens = compared(own, partial(_rendered_side, pair, name, template, settings), template.tokenizer)
            remarks, retokenized = remarks + said, retokenized + [tokens] * (tokens > 0)
        sides.append(side)
    if not settings.different_prompts:
        refuse_other_prompts(sides)
    return sides, remarks, retokenized


def _rendered_side(pair: Pair, name: str, template, settings: RenderSettings) -> tuple[Side, list[str]]:
    """The side of a pair that is not recorded, or the messages of one that is; and remarks. Raises DropPair."""
    if not template.tokenizer.chat_template:
        raise DropPair("no chat template")
    return _of_turns(settings, _conversation(pair, name, template), pair.weights[SIDES.index(name)])


def _ends_inside(rendered: RenderedSide, conversation: Conversation) -> bool:
    """Whether a trained answer has its end-of-turn token as text."""
    turns = [turn for sequence in rendered.sequences for turn in sequence.turns]
    stops = {turn.stop for turn in turns}
    contents = [conversation.messages[turn.message].get("content") or "" for turn in turns]
    return any(stop in content for content in contents for stop in stops)


def completion_sides(pair: Pair, template: ChatTemplate) -> list[Side]:
    """TRL 1.16's rule for conversations: ids of the whole text as the template writes it; supervised is what comes
    after the common token prefix of the prompt (with its generation prompt) and both sides."""
    both = conversations(pair)
    prompt = template.render(both[0][: pair.n_prompt], pair.tools, generation=True, **pair.template_kwargs)
    texts = [template.render(messages, pair.tools, **pair.template_kwargs) for messages in both]
    prompt_ids, *whole = (
        template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (prompt, *texts)
    )
    start = min(common_prefix(prompt_ids, ids) for ids in whole)
    return [Side(ids, [0] * start + [1] * (len(ids) - start), [1.0] * len(ids), [len(ids)]) for ids in whole]
