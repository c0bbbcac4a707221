"""A tokenized pair of two sequences a side, written down by hand as masking has it for a template that leaves earlier
thoughts out; a token is a byte or a marker.

    chosen 1    PROMPT 23 | think s u m /think 1 2 end                    31 tokens,  8 supervised
    chosen 2    PROMPT 23 | 1 2 end \\n, the next question 13, header 11 | Y e s . end     56, 5
    rejected 1  as chosen 1, but 1 3 end                                  31,  8
    rejected 2  as chosen 2, but 1 3 end \\n, and | N o . end              55,  4

First sequences begin alike up to their 1: 23 + 5 + 1 = 29 tokens; second ones up to theirs: 24. Distinct are 23 of the
prompt, 6 + 2 + 2 of the first sequences, 1 + 32 + 31 of the second ones: 97 of 173.
"""

from tiny import CHATML, tokenizer_for

THOUGHTS = "earlier thoughts left out by the template"
REWRITTEN = "text rewritten at message 3"
PROMPT = "<|im_start|>user\n3*4?<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
PIECES = {  # (text, mask) of each sequence
    "chosen": [
        [(PROMPT, 0), ("<think>sum</think>12<|im_end|>", 1)],
        [(f"{PROMPT}12{NEXT}", 0), ("Yes.<|im_end|>", 1)],
    ],
    "rejected": [
        [(PROMPT, 0), ("<think>sum</think>13<|im_end|>", 1)],
        [(f"{PROMPT}13{NEXT}", 0), ("No.<|im_end|>", 1)],
    ],
}
LENGTHS = {"chosen": [31, 56], "rejected": [31, 55]}
SHARED = {"chosen": [29, 24], "rejected": [29, 24]}
ENDS = {"chosen": [30, 86], "rejected": [30, 85]}
TOKENS, DISTINCT = 173, 97


def letters():
    """A token is a byte, or a marker of the template; those of thoughts are not special."""
    return tokenizer_for(CHATML + "{# <think></think> #}", "letters", eos="<|im_end|>")


def tokens_of(pieces, tokenizer) -> tuple[list[int], list[int]]:
    """(ids, mask) of one sequence."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    return sum(ids, []), [bit for own, (_, bit) in zip(ids, pieces, strict=True) for _ in own]


def tokenized_row(tokenizer, key: str = "a.jsonl:1") -> dict:
    row = {"key": key, "distinct": DISTINCT}
    for side, sequences in PIECES.items():
        both = [tokens_of(pieces, tokenizer) for pieces in sequences]
        row[f"{side}_ids"], row[f"{side}_mask"] = (sum(column, []) for column in zip(*both, strict=True))
        row |= {f"{side}_weights": [], f"{side}_lengths": [len(ids) for ids, _ in both]}
    return row | {"chosen_breaks": [THOUGHTS], "rejected_breaks": [REWRITTEN]}


def plain_row(tokenizer, key: str = "a.jsonl:2") -> dict:
    """The first sequences alone: 62 tokens, 29 of them shared, 33 distinct."""
    row = {"key": key, "distinct": 33}
    for side, (first, _) in PIECES.items():
        row[f"{side}_ids"], row[f"{side}_mask"] = tokens_of(first, tokenizer)
        row |= {f"{side}_weights": [], f"{side}_lengths": [], f"{side}_breaks": []}
    return row
