"""Masks and tokens by hand: the bytes of a token, the supervised text, the errors."""

import copy
import json
import re
from functools import cache

from conversations import assistant, user
from tiny import CHATML, tokenizer_for
from tokenizers import Tokenizer, decoders, processors

from mdpo.masking.chat_template import ChatTemplate


@cache
def byte_level_alphabet():
    """GPT-2's printable stand-ins for bytes -> bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_tokens(tokenizer) -> bool:
    return isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)


@cache
def token_bytes(tokenizer):
    """id -> the bytes that the token stands for, from the vocabulary alone."""
    added = {i: str(t).encode() for i, t in tokenizer.added_tokens_decoder.items()}
    table = {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            table[i] = added[i]
        elif byte_level_tokens(tokenizer):
            table[i] = bytes(byte_level_alphabet()[c] for c in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            table[i] = bytes([int(token[3:5], 16)])
        else:
            table[i] = token.replace("▁", " ").encode()
    return table


def byte_ranges(tokenizer, ids, text):
    """[start, end) of each token in the text's UTF-8, by laying the tokens' own bytes one behind the other. A space
    that Metaspace put before a word (prepend_scheme "always") stands for no byte of the text."""
    data, table, position, ranges = text.encode(), token_bytes(tokenizer), 0, []
    for i in ids:
        piece = table[i]
        if not data.startswith(piece, position) and piece.startswith(b" "):
            piece = piece[1:]
        assert data.startswith(piece, position), f"{piece!r} is not at {position} of {text!r}"
        ranges.append((position, position + len(piece)))
        position += len(piece)
    assert position == len(data)
    return ranges


# With a token a character, [user("a?"), assistant("bc")] is in ChatML
#   0 <|im_start|>   1-5 user\n        6-7 a?     8 <|im_end|>    9 \n
#  10 <|im_start|>  11-20 assistant\n  21-22 bc  23 <|im_end|>  24 \n
# and a second round of one character each continues with
#  25 <|im_start|>  26-30 user\n       31 e      32 <|im_end|>  33 \n
#  34 <|im_start|>  35-44 assistant\n  45 f      46 <|im_end|>  47 \n
LETTERS = ChatTemplate(tokenizer_for(CHATML, "letters"))


def rounds(*texts):
    return [user(text) if k % 2 == 0 else assistant(text) for k, text in enumerate(texts)]


def ones(mask):
    return [t for t, m in enumerate(mask) if m]


def byte_level(*merges, trim_offsets=False):
    """The tokenizer of LETTERS with these merges, reporting words with or without their space."""
    tokenizer = copy.deepcopy(LETTERS.tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for merge in merges:
        state["model"]["vocab"]["".join(merge)] = 1000 + len(state["model"]["merges"])
        state["model"]["merges"].append(list(merge))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def said(tokenizer, ids, mask):
    """The texts of the runs of supervised tokens."""
    runs, before = [], 0
    for token, bit in zip(ids, mask, strict=True):
        if bit:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = bit
    return [tokenizer.decode(run) for run in runs]
