"""Plain texts → token ids and masks: no chat template writes them, and their turns are unknown."""

import re
from typing import cast

from mdpo.errors import DropPair, UserError
from mdpo.masking.stops import any_of
from mdpo.types import Pair, common_prefix

PLAIN = "plain texts: no chat template or turn masks, all behind the prompt or the common start is supervised"
GUESSED = "plain texts without a prompt: words that both answers begin with are not supervised"
ROLES = "role marks in plain texts: write them as messages, or set mask_user_turns: false"
# What public datasets and templates write where a role begins: chat tokens of any family, brackets, headings, names.
ASKS, ANSWERS = "(?:human|user|prompter)", "(?:assistant|chatbot|chatgpt|bot|gpt|ai|model)"
ROLE = rf"(?:{ASKS}|{ANSWERS}|system|developer|tool|observation)"
ROLE_MARKS = re.compile(
    rf"<[|｜](?:im_start|im_end|start_header_id|eot_id|start_of_role|start|turn|message|channel|end|eot|{ROLE})[|｜]?>"
    rf"|<\|(?:START|END)_OF_TURN_TOKEN\|>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|\[\|{ROLE}\|\]"
    rf"|^[ \t]*#{{2,4}} ?(?:instruction|response|{ROLE})\b",
    re.IGNORECASE | re.MULTILINE,
)
NAMES = [  # lines of both: one alone may be a key in a file
    re.compile(rf"^[ \t]*[^\w\s]{{0,3}}{names}[^\w\s]{{0,3}}:", re.IGNORECASE | re.MULTILINE)
    for names in (ASKS, ANSWERS)
]


class PlainText:
    """Takes the place of ChatTemplate where rows are plain strings, which no template renders."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stops = tokenizer, {tokenizer.eos_token} - {None}
        self.special = any_of(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)

    def locate(self, *_, **__):
        raise DropPair("a conversation among plain texts")

    render = locate


def plain_sides(pair: Pair, template, ours: bool) -> tuple[list[tuple], list[str]]:
    """Both sides, (ids, mask, weights) each, and remarks. Supervised is what comes after the common token prefix of
    the prompt and both sides; each text ends with EOS: TRL 1.16's rule. With `ours` (mask_user_turns) a text that ends
    with EOS or the template's end-of-turn token, also before white space, ends with that token, as the policy
    samples nothing after it. Raises UserError."""
    tokenizer = template.tokenizer
    eos = tokenizer.eos_token
    if not eos:
        raise UserError("Plain texts end with the end-of-sequence token, and the tokenizer has none.", "tokenizer")

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    texts = cast(tuple[str, str], (pair.chosen, pair.rejected))  # `row_to_pair`: both or none
    remarks: list[str] = []
    if ours:
        sides = [_closed(text, template.stops, encode, tokenizer) for text in texts]
        marked = any(has_role_marks(text, template) for text in texts)
        remarks = [PLAIN] + [GUESSED] * (not pair.prompt_given) + [ROLES] * marked
    else:
        sides = [encode(text if text.endswith(eos) else text + eos) for text in texts]
    prompt = encode(texts[0][: pair.n_prompt])
    start = min(common_prefix(prompt, ids) for ids in sides)
    return [(ids, [0] * start + [1] * (len(ids) - start), [1.0] * len(ids)) for ids in sides], remarks


def _closed(text: str, stops: set[str], encode, tokenizer) -> list[int]:
    """Ids of a text up to the token that ends it, once, whoever writes it: the text, the tokenizer, or nobody."""
    bare, eos = text.rstrip(), tokenizer.eos_token
    ended = next((stop for stop in sorted(stops, key=len, reverse=True) if bare.endswith(stop)), None)
    ids = encode(bare if ended else text + eos)
    end = tokenizer.convert_tokens_to_ids(ended or eos)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and ids[-2] == end:
        ids = ids[:-1]  # the tokenizer adds an EOS of its own
    return ids


def has_role_marks(text: str, template) -> bool:
    """Whether a text has marks of a role in it: a special token of the tokenizer's that neither begins nor ends it, or
    words that mean one in public datasets."""
    body = text.strip()
    for stop in template.stops:
        body = body.removesuffix(stop)
    body = body.removeprefix(template.tokenizer.bos_token or "")
    named = all(names.search(body) for names in NAMES) or all(name in body for name in ("USER: ", "ASSISTANT:"))
    return bool(named or template.special.search(body) or ROLE_MARKS.search(body))
