"""Sides of several sequences as a person sees them: --json, the terminal, the pairs of the HTML report."""

import io
import json
import random

import pytest
import show_masks
from datasets import Dataset
from rich.console import Console
from several_sequences import (
    ENDS,
    LENGTHS,
    NEXT,
    PIECES,
    PROMPT,
    SHARED,
    THOUGHTS,
    letters,
    plain_row,
    tokenized_row,
    tokens_of,
)

from mdpo.masking.tokenizer import token_text
from mdpo.reporting.html_page import shown_pair
from mdpo.reporting.token_view import (
    COLORS,
    CONTEXT,
    END,
    SUPERVISED,
    sample_pairs,
    sequence_views,
    shared_tokens,
    special_ids,
    to_json,
)
from mdpo.reporting.token_view import SHARED as DIMMED
from mdpo.types import SIDES, common_prefix, distinct_tokens, split


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def as_json(row, tokenizer):
    return json.loads(json.dumps(to_json(row, token_text(tokenizer), special_ids(tokenizer))))


@pytest.fixture
def pair(tokenizer):
    return as_json(tokenized_row(tokenizer), tokenizer)


@pytest.fixture
def plain(tokenizer):
    return as_json(plain_row(tokenizer), tokenizer)


# ---- what sequences share


@pytest.mark.parametrize(
    "sequences, shared",
    [
        ([[5, 6, 7], [5, 6, 8], [5, 9], [4]], [2, 2, 1, 0]),
        ([[1, 2, 3]], [0]),
        ([[1, 2], [1, 2]], [2, 2]),  # wholly
        ([[1, 2, 3], [1, 2]], [2, 2]),  # one is the beginning of the other
        ([[], [1]], [0, 0]),
        ([[3, 1], [1, 1], [3, 2]], [1, 0, 1]),  # not next to each other in the order of the pair
    ],
)
def test_shared_tokens_by_hand(sequences, shared):
    assert shared_tokens(sequences) == shared


def test_shared_tokens_are_those_of_a_comparison_of_all_with_all():
    draw = random.Random(0)
    for _ in range(200):
        sequences = [[draw.randrange(2) for _ in range(draw.randrange(7))] for _ in range(draw.randrange(1, 7))]
        others = [sequences[:i] + sequences[i + 1 :] for i in range(len(sequences))]
        every = [max((common_prefix(s, o) for o in of), default=0) for s, of in zip(sequences, others, strict=True)]
        assert shared_tokens(sequences) == every


# ---- --json


def test_json_has_every_sequence(pair, tokenizer):
    for name in SIDES:
        side = pair[name]
        assert {field: side[field] for field in ("lengths", "shared", "ends", "weights")} == {
            "lengths": LENGTHS[name], "shared": SHARED[name], "ends": ENDS[name], "weights": []}  # fmt: skip
        texts = ["".join(own) for own in split(side["tokens"], side["lengths"])]
        assert texts == ["".join(text for text, _ in pieces) for pieces in PIECES[name]]
        assert len(side["ids"]) == len(side["mask"]) == sum(LENGTHS[name])
    assert pair["chosen"]["breaks"] == [THOUGHTS]
    assert list(pair) == ["key", "chosen", "rejected"]


@pytest.mark.parametrize("missing", [None, "empty", "absent"])
def test_json_of_one_sequence_a_side(tokenizer, missing):
    """Rows without lengths and breaks, or with empty ones, as rows were before sequences."""
    row = plain_row(tokenizer)
    for name in SIDES:
        for field in ("lengths", "breaks"):
            row[f"{name}_{field}"] = None if missing is None else []
            if missing == "absent":
                del row[f"{name}_{field}"]
    side = as_json(row, tokenizer)["rejected"]
    assert (side["lengths"], side["shared"], side["ends"], side["breaks"]) == ([31], [29], [30], [])


def test_an_end_of_turn_is_looked_for_within_its_sequence(tokenizer):
    """The next sequence begins supervised: over the edge no end would be seen."""
    row = plain_row(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row |= {"chosen_ids": [7, end, 8, end], "chosen_mask": [0, 1, 1, 1], "chosen_lengths": [2, 2]}
    assert as_json(row, tokenizer)["chosen"]["ends"] == [1, 3]
    assert as_json({**row, "chosen_lengths": []}, tokenizer)["chosen"]["ends"] == [3]


# ---- the terminal

PLAIN_PROMPT = "<|im_start|>user↵\n3*4?<|im_end|>↵\n<|im_start|>assistant↵\n"
PLAIN_NEXT = "<|im_end|>↵\n<|im_start|>user↵\nSure?<|im_end|>↵\n<|im_start|>assistant↵\n"
LEGEND = "\n«supervised⟦end of turn⟧»\n┊ end of the shared prefix   ↵ line break\n"
SCREEN = f"""{LEGEND}
a.jsonl:1, 173 tokens in 4 sequences, 97 distinct

chosen: 2 sequences, 87 tokens, 13 supervised
chosen, sequence 1 of 2 (31 tokens, 8 supervised, 29 shared)
{PLAIN_PROMPT}«<think>sum</think>1┊2⟦<|im_end|>⟧»

chosen, sequence 2 of 2: earlier thoughts left out by the template (56 tokens, 5 supervised, 24 shared)
{PLAIN_PROMPT}1┊2{PLAIN_NEXT}«Yes.⟦<|im_end|>⟧»

rejected: 2 sequences, 86 tokens, 12 supervised
rejected, sequence 1 of 2 (31 tokens, 8 supervised, 29 shared)
{PLAIN_PROMPT}«<think>sum</think>1┊3⟦<|im_end|>⟧»

rejected, sequence 2 of 2: text rewritten at message 3 (55 tokens, 4 supervised, 24 shared)
{PLAIN_PROMPT}1┊3{PLAIN_NEXT}«No.⟦<|im_end|>⟧»

"""
# As it was before there were sequences.
SCREEN_OF_ONE = f"""{LEGEND}
a.jsonl:2, shared prefix of 29 tokens

chosen: 31 tokens, 8 supervised
{PLAIN_PROMPT}«<think>sum</think>1┊2⟦<|im_end|>⟧»
rejected: 31 tokens, 8 supervised
{PLAIN_PROMPT}«<think>sum</think>1┊3⟦<|im_end|>⟧»
"""


def screen(pairs, **options) -> str:
    console = Console(file=io.StringIO(), width=60, **options)
    show_masks.show(pairs, console)
    return console.file.getvalue()


def test_the_screen_without_color(pair, plain):
    assert screen([pair]) == SCREEN
    assert screen([plain]) == SCREEN_OF_ONE


def test_one_side_of_several_sequences(tokenizer):
    """A reason may be missing. Chosen's second sequence shares the prompt with both of the others."""
    row = tokenized_row(tokenizer)
    first = {f"rejected_{field}": values for field, values in
             (("ids", row["rejected_ids"][:31]), ("mask", row["rejected_mask"][:31]), ("lengths", []))}  # fmt: skip
    out = screen([as_json({**row, **first, "chosen_breaks": [], "rejected_breaks": None}, tokenizer)])
    assert "a.jsonl:1, 118 tokens in 3 sequences, 66 distinct\n" in out  # 23 + 6 + 2 + 2 + 33
    assert "\nchosen, sequence 2 of 2 (56 tokens, 5 supervised, 23 shared)\n" in out
    assert f"\nrejected: 31 tokens, 8 supervised\n{PLAIN_PROMPT}«" in out


def test_a_sequence_that_is_wholly_shared_says_so(tokenizer):
    """Both sides begin with the same turn."""
    row = tokenized_row(tokenizer)
    row |= {"rejected_ids": row["chosen_ids"][:31] + row["rejected_ids"][31:]}
    assert screen([as_json(row, tokenizer)]).count("<think>sum</think>12⟦<|im_end|>⟧»┊\n") == 2


def test_the_screen_in_color(pair):
    """Texts and their looks by hand: dimmed are the first 24 tokens, a prompt and its 1."""
    [_, second] = sequence_views(pair["chosen"])
    text = show_masks.sequence_text(second, "chosen", plain=False)
    looks = [COLORS[DIMMED], COLORS[CONTEXT], COLORS[SUPERVISED, "chosen"], COLORS[END, "chosen"]]
    found = []
    for span in text.spans:
        ink, _, paper = span.style.removesuffix(" bold").partition(" on ")
        [kind] = [n for n, (own, *papers) in enumerate(looks) if own == ink and paper in papers]
        if not found or found[-1][0] != kind:
            found.append((kind, ""))
        found[-1] = (kind, found[-1][1] + text.plain[span.start : span.end])
    assert found == [(0, f"{PLAIN_PROMPT}1"), (1, f"2{PLAIN_NEXT}"), (2, "Yes."), (3, "<|im_end|>")]
    out = screen([pair], force_terminal=True, color_system="truecolor")
    assert "«" not in out and f"chosen, sequence 2 of 2: {THOUGHTS} (56 tokens" in out


# ---- the HTML report's pairs


def test_sample_pairs_show_several_sequences_first(tokenizer):
    """Turns are counted within sequences; both rows have one run a sequence, so that the first has two turns a side."""
    rows = Dataset.from_list([plain_row(tokenizer, f"a:{n}") for n in range(3)] + [tokenized_row(tokenizer, "several")])
    assert [pair["key"] for pair in sample_pairs(rows, tokenizer)] == ["several", "a:0"]
    assert [pair["key"] for pair in sample_pairs(rows.select(range(3)), tokenizer)] == ["a:0", "a:1"]


def test_turns_of_samples_end_with_their_sequence(tokenizer):
    """All supervised: a sequence is a turn, and over the edge there would be one alone."""
    several = {**tokenized_row(tokenizer, "two turns"), "chosen_mask": [1] * 87, "rejected_mask": [1] * 86}
    row = {**plain_row(tokenizer, "one turn"), "chosen_lengths": [10, 21]}  # several sequences, one turn
    rows = Dataset.from_list([row, several])
    assert [pair["key"] for pair in sample_pairs(rows, tokenizer)] == ["two turns", "one turn"]


def test_pairs_of_the_html_report(pair):
    chosen, rejected = shown_pair(pair)["sides"]
    assert (chosen["tokens"], chosen["supervised"]) == (87, 13)
    first, second = chosen["sequences"]
    assert (first["title"], second["title"]) == ("sequence 1 of 2", f"sequence 2 of 2: {THOUGHTS}")
    assert second["counts"] == "56 tokens, 5 supervised, 24 shared"
    # Kinds: context, shared prefix, supervised, end of turn; s where a supervised token is shared too.
    kinds = [[second["html"].count(f'"t k{kind}"') for kind in range(4)], first["html"].count('"t k2 s"')]
    assert kinds == [[27, 24, 4, 1], 6]


def test_long_sequences_share_what_a_side_shows(pair, monkeypatch):
    """Of 56 tokens 8 at the beginning and 15 at the end: half of 16 and of 30 each; a part is no shorter than LEAST."""
    monkeypatch.setattr("mdpo.reporting.html_page.HEAD", 16)
    monkeypatch.setattr("mdpo.reporting.html_page.TAIL", 30)
    monkeypatch.setattr("mdpo.reporting.html_page.LEAST", 5)
    first, second = shown_pair(pair)["sides"][0]["sequences"]
    assert (first["html"].count("<span"), second["html"].count("<span")) == (23, 23)
    assert "… 33 tokens …" in second["html"] and "… 8 tokens …" in first["html"]
    monkeypatch.setattr("mdpo.reporting.html_page.LEAST", 20)
    assert [s["html"].count("<span") for s in shown_pair(pair)["sides"][0]["sequences"]] == [31, 40]


def test_the_pair_by_hand_is_what_its_page_says(tokenizer):
    """The derivation in tests/helpers/several_sequences.py."""
    row = tokenized_row(tokenizer)
    sequences = [tokens_of(pieces, tokenizer)[0] for name in SIDES for pieces in PIECES[name]]
    assert [len(s) for s in sequences] == LENGTHS["chosen"] + LENGTHS["rejected"]
    assert distinct_tokens(sequences) == row["distinct"] == 97
    assert len(tokenizer(PROMPT)["input_ids"]) == 23 and len(tokenizer(NEXT)["input_ids"]) == 1 + 1 + 13 + 11
