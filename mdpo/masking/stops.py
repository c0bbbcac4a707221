"""The tokens with which a chat template closes an assistant turn and opens one, found by rendering short turns.

`template` is a ChatTemplate: its `render`, and its regular expressions of the tokenizer's special and added tokens.
"""

import re

from mdpo.errors import DropPair, UserError
from mdpo.types import common_prefix

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
THINK_PREFIX = re.compile(r"<think>\s*(</think>\s*)?$")  # what a generation prompt may add and history leaves out


def any_of(tokens) -> re.Pattern:
    """A pattern that finds the longest of these tokens; without any it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(set(tokens), key=len, reverse=True))) or r"(?!)")


def probe_stop(template) -> set[str]:
    """The token with which the template closes an assistant turn in the middle of a conversation.

    The closing is what the template writes after the turn whether or not a user turn follows; its last special
    token counts (Cohere writes two), or where it has none, its last ordinary added one. Where the two ways have nothing
    in common (`<|return|>` and `<|end|>` of gpt-oss, GLM-4's bare `<|user|>`) it is the first token. Raises UserError
    where there is none.
    """
    turns = [{"role": r, "content": f"Qz{i}"} for i, r in enumerate(["user", "assistant", "user", "assistant"])]
    try:
        middle = template.render(turns).partition("Qz1")[2].partition("Qz2")[0]
        final = template.render(turns[:2]).partition("Qz1")[2]
    except DropPair:
        return set()
    tokenizer = template.tokenizer
    for pattern in (template.special, template.added):
        tokens = pattern.findall(middle)
        closing = tokens[: common_prefix(tokens, pattern.findall(final))]
        if tokenizer.eos_token in closing:
            return set()
        if closing:
            return {closing[-1]}
    if not tokens:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path!r} writes {middle!r} after an assistant turn, and "
            "none of it is a special token of the tokenizer, or another that was added to it: the end of a turn cannot "
            "be supervised. Use a template whose end-of-turn token the tokenizer knows, or add that token to it.",
            key="chat_template",
        )
    return {tokens[0]}


def probe_empty_block(template) -> str:
    """The think block that the generation prompt supplies with enable_thinking=False, "" where there is none."""
    if "enable_thinking" not in str(template.tokenizer.chat_template):
        return ""
    turn = [{"role": "user", "content": "Qz0"}]
    try:
        own, off = (template.render(turn, generation=True, **way) for way in ({}, {"enable_thinking": False}))
    except DropPair:
        return ""
    header = THINK_PREFIX.sub("", own.partition("Qz0")[2])
    # GLM-4 also writes "/nothink" behind the user's text; what counts is what follows the header.
    block = off.partition("Qz0")[2].rpartition(header.lstrip())[2] if header.strip() else ""
    return block if EMPTY_THINK.fullmatch(block) else ""


def probe_header(template) -> str:
    """The assistant's header as the generation prompt writes it, from its last special token on (or, without one, its
    last ordinary added token)."""
    try:
        prompt = template.render([{"role": "user", "content": "Qz0"}], generation=True).partition("Qz0")[2]
    except DropPair:
        return ""
    prompt = THINK_PREFIX.sub("", prompt)
    tokens = list(template.special.finditer(prompt)) or list(template.added.finditer(prompt))
    return prompt[tokens[-1].start() :] if tokens else ""
