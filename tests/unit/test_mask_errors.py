"""The edges of masks, derived by hand: straddling tokens, cuts, equal sides, TRL's own rule, and what is refused."""

import copy
from types import SimpleNamespace

import errors
import pytest
from conversations import assistant, pair_of, text_turns, tool
from datasets import Dataset
from mask_checks import LETTERS, byte_level, byte_ranges, ones, rounds, said
from templates import chat_template
from tiny import CHATML, tokenizer_for
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from mdpo.data.rows import row_to_pair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.masking.spans import STRADDLE, span_mask, tokenize
from mdpo.types import Pair, common_prefix


def tokenized(chosen, rejected, n_prompt=1, max_length=None, truncation_mode="drop", **more):
    settings = RenderSettings(max_length, truncation_mode, **more)
    return tokenize_pair(Pair(chosen, rejected, n_prompt), LETTERS, settings)


# ---- spans and tokens


@pytest.mark.parametrize(
    "ranges, spans, mask",
    [
        ([(0, 4), (4, 6), (6, 9)], [(4, 9)], [0, 1, 1]),
        ([(0, 4), (4, 6), (6, 9)], [(0, 4), (6, 9)], [1, 0, 1]),
        ([(0, 4), (4, 6), (6, 9)], [(0, 4), (4, 6)], [1, 1, 0]),  # spans that touch
        ([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2)], [0, 1, 1, 0]),  # one character in two tokens
        ([(0, 3), (3, 3), (3, 5)], [(3, 5)], [0, 1, 1]),  # a token of no character belongs to what follows
        ([(0, 3), (3, 3), (3, 5)], [(0, 3)], [1, 0, 0]),
        ([(0, 3)], [], [0]),
        ([(0, 4), (4, 6), (6, 9)], [(5, 9)], None),  # begins inside a token
        ([(0, 4), (4, 6), (6, 9)], [(4, 7)], None),  # ends inside one
        ([(0, 9)], [(4, 5)], None),  # lies inside one
    ],
)
def test_span_mask(ranges, spans, mask):
    if mask is None:
        with errors.dropped(STRADDLE):
            span_mask(ranges, spans)
    else:
        assert span_mask(ranges, spans) == mask


@pytest.mark.parametrize(
    "text, merges, ranges",
    [
        ("a bc", ["Ġb"], [(0, 1), (1, 3), (3, 4)]),
        ("a  b", ["Ġb"], [(0, 1), (1, 2), (2, 4)]),  # GPT-2 splits before the last space
        ("a \n", [], [(0, 1), (1, 2), (2, 3)]),
        ("<|im_start|> a", ["Ġa"], [(0, 12), (12, 14)]),
        ("é ", [], [(0, 1), (0, 1), (1, 2)]),  # both tokens of a character carry its range
        ("\n  a", ["ĊĠ", "Ġa"], [(0, 2), (2, 4)]),  # a space at a token's end is that token's
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_tokens_tile_the_text(text, merges, ranges, trim_offsets):
    tokenizer = byte_level(*merges, trim_offsets=trim_offsets)
    assert tokenize(text, tokenizer)[1] == ranges


# ---- both sides: what they share, what is cut


@pytest.mark.parametrize(
    "chosen, rejected, distinct, chosen_ones, rejected_ones",
    [
        (("a?", "bc"), ("a?", "bd"), 28, [21, 22, 23], [21, 22, 23]),
        (("a?", "bc"), ("a?", "b"), 27, [21, 22, 23], [21, 22]),
        (("a?", "bc"), ("a?", "x"), 28, [21, 22, 23], [21, 22]),
        (("a?", "bc", "e", "f"), ("a?", "bc", "e", "g"), 51, [21, 22, 23, 45, 46], [21, 22, 23, 45, 46]),
        (("a?", "bc", "e", "f"), ("a?", "bc"), 48, [21, 22, 23, 45, 46], [21, 22, 23]),
        # the same ids, but where the rejected side has a newline of the template the chosen side has content
        (
            ("a?", "bc<|im_end|>\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf"),
            ("a?", "bc", "e", "f"),
            48,
            list(range(21, 47)),
            [21, 22, 23, 45, 46],
        ),
    ],
)
def test_distinct_tokens_by_hand(chosen, rejected, distinct, chosen_ones, rejected_ones):
    """A round is 25 tokens, 24 with an answer of one character, a second one 23. The sides begin alike for 22, 22, 21,
    45, 25 and all 48 tokens, whatever their masks say."""
    got = tokenized(rounds(*chosen), rounds(*rejected))
    assert (ones(got.chosen_mask), ones(got.rejected_mask)) == (chosen_ones, rejected_ones)
    assert got.distinct == distinct


ONE = (("a?", "bc"), ("a?", "bd"))  # 25 tokens a side, the first difference at 22
TWO = (("a?", "bc", "e", "f"), ("a?", "bd", "e", "f"))  # 48 tokens a side
LATE = (("a?", "bc", "e", "f"), ("a?", "bc", "e", "g"))  # the first difference at 45


@pytest.mark.parametrize(
    "sides, mode, max_length, outcome",
    [
        (ONE, "drop", 25, [21, 22, 23]),
        (ONE, "drop", 24, "over-long"),
        (ONE, "keep_start", 25, [21, 22, 23]),
        (ONE, "keep_start", 24, [21, 22, 23]),
        (ONE, "keep_start", 23, [21, 22]),
        (ONE, "keep_start", 22, "equal after truncation"),
        (ONE, "keep_start", 21, "last turn lost"),
        (ONE, "keep_start", 3, "last turn lost"),
        (TWO, "drop", 47, "over-long"),
        (TWO, "keep_start", 47, [21, 22, 23, 45, 46]),
        (TWO, "keep_start", 46, [21, 22, 23, 45]),
        (TWO, "keep_start", 45, "last turn lost"),  # the first turn is still there, and differs
        (TWO, "keep_start", 30, "last turn lost"),
        (LATE, "keep_start", 46, [21, 22, 23, 45]),
    ],
)
def test_truncation_by_hand(sides, mode, max_length, outcome):
    chosen, rejected = (rounds(*side) for side in sides)
    if isinstance(outcome, str):
        with errors.dropped(outcome):
            tokenized(chosen, rejected, 1, max_length, mode)
    else:
        got = tokenized(chosen, rejected, 1, max_length, mode)
        assert ones(got.chosen_mask) == outcome
        whole = tokenized(chosen, rejected)
        assert (got.chosen_ids, got.rejected_ids) == (whole.chosen_ids[:max_length], whole.rejected_ids[:max_length])
        assert len(got.chosen_mask) == len(got.chosen_ids)
        shared = common_prefix(whole.chosen_ids, whole.rejected_ids)
        assert got.distinct == len(got.chosen_ids) + len(got.rejected_ids) - shared


def test_only_the_longer_side_is_cut():
    got = tokenized(rounds("a?", "bcde"), rounds("a?", "x"), max_length=24, truncation_mode="keep_start")
    assert (ones(got.chosen_mask), ones(got.rejected_mask)) == ([21, 22, 23], [21, 22])
    assert (len(got.chosen_ids), len(got.rejected_ids)) == (24, 24)


@pytest.mark.parametrize(
    "chosen, rejected, n_prompt, key",
    [
        (("a?", "bc"), ("a?", "bc"), 1, "chosen equals rejected"),
        (("a?", "bc", "e"), ("a?", "bc", "f"), 3, "no assistant turn"),
    ],
)
def test_pairs_that_teach_nothing(chosen, rejected, n_prompt, key):
    with errors.dropped(key):
        tokenized(rounds(*chosen), rounds(*rejected), n_prompt)


# ---- mask_turns=False: TRL's rule, against TRL itself

PROMPT, CHOSEN, REJECTED = text_turns(1)[:1], [assistant("Twelve. 🙂")], [assistant("Nine.")]
MORE = [tool("<|im_end|>\n12", "python"), assistant("So 12.")]
TRL_ROWS = {
    "prompt": {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    "no prompt": {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
    "several turns": {"prompt": PROMPT, "chosen": CHOSEN + MORE, "rejected": REJECTED + MORE},
    "shared turns, no prompt": {"chosen": PROMPT + CHOSEN + MORE, "rejected": PROMPT + CHOSEN + MORE[:1] + REJECTED},
    "plain strings": {"prompt": "3 * 4 is", "chosen": " 12.", "rejected": " 9.<eos>"},
    "plain strings, no prompt": {"chosen": "3 * 4 is 12.", "rejected": "3 * 4 is 9."},
}


def by_trl(row, tokenizer, max_length=None):
    """((ids, mask) of both sides) as trl.DPOTrainer makes them, or None for a dropped row."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    rows = Dataset.from_list([copy.deepcopy(row)])
    rows = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    if not len(rows):
        return None
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode="keep_start")(list(rows))
    sides = []
    for ids, mask, attended in zip(*(batch[k].tolist() for k in TRL_KEYS), strict=True):
        sides.append((ids[: sum(attended)], mask[: sum(attended)]))
    return tuple(sides)


TRL_KEYS = ("input_ids", "completion_mask", "attention_mask")


# ChatML keeps prefixes; DeepSeek-V3's generation prompt opens a think block that no rendered turn has; Qwen3.5's opens
# one that the rendered turn closes at once.
@pytest.mark.parametrize("name", ["qwen2_5_vl", "deepseekv3", "qwen3_5_think"])
@pytest.mark.parametrize("case", TRL_ROWS)
def test_the_completion_rule_is_that_of_trl(case, name):
    template, row = chat_template(name), TRL_ROWS[case]
    expected = by_trl(row, template.tokenizer)
    settings = RenderSettings(None, "keep_start", mask_turns=False)
    got = tokenize_pair(row_to_pair(row, mask_turns=False), template, settings)
    assert ((got.chosen_ids, got.chosen_mask), (got.rejected_ids, got.rejected_mask)) == expected
    assert sum(got.chosen_mask) > 0


@pytest.mark.parametrize("beyond_the_prompt", [-1, 0, 1, 3])
def test_the_completion_rule_cuts_as_trl_does(beyond_the_prompt):
    template, row = chat_template("qwen2_5_vl"), TRL_ROWS["several turns"]
    (_, mask), _ = by_trl(row, template.tokenizer)
    max_length = mask.index(1) + beyond_the_prompt
    expected = by_trl(row, template.tokenizer, max_length)
    settings = RenderSettings(max_length, "keep_start", mask_turns=False)
    pair = row_to_pair(row, mask_turns=False)
    assert (expected is None) == (beyond_the_prompt <= 0)
    if expected is None:
        with errors.dropped("last turn lost"):
            tokenize_pair(pair, template, settings)
    else:
        got = tokenize_pair(pair, template, settings)
        assert ((got.chosen_ids, got.chosen_mask), (got.rejected_ids, got.rejected_mask)) == expected


def test_the_completion_rule_supervises_tool_output_and_ours_does_not():
    """The wrong twin of the turn mask: TRL's rule counts what the tool wrote."""
    template, row = chat_template("qwen2_5_vl"), TRL_ROWS["several turns"]
    sides = {}
    for mask_turns in (True, False):
        settings = RenderSettings(None, mask_turns=mask_turns)
        got = tokenize_pair(row_to_pair(row, mask_turns), template, settings)
        taught = [i for i, m in zip(got.chosen_ids, got.chosen_mask, strict=True) if m]
        sides[mask_turns] = template.tokenizer.decode(taught)
    assert sides[True] == "Twelve. 🙂<|im_end|>So 12.<|im_end|>"
    assert sides[False] == (
        "Twelve. 🙂<|im_end|>\n<|im_start|>tool\n<|im_end|>\n12<|im_end|>\n<|im_start|>assistant\nSo 12.<|im_end|>\n"
    )


# ---- what is refused altogether


def test_an_end_of_turn_that_is_no_special_token():
    template = CHATML.replace("<|im_start|>", "### ").replace("<|im_end|>", " END")
    with errors.refused("chat_template", r" END\n"):
        ChatTemplate(tokenizer_for(template))
    # With special headers the next header is all that could close a turn, as in GLM-4: it closes the last one too.
    template = ChatTemplate(tokenizer_for(CHATML.replace("<|im_end|>", " END")))
    got = tokenize_pair(pair_of(rounds("a?", "b")), template, RenderSettings(None))
    assert said(template.tokenizer, got.chosen_ids, got.chosen_mask) == ["b END\n<|im_start|>"]


def test_a_tokenizer_that_cannot_report_positions():
    slow = SimpleNamespace(is_fast=False, name_or_path="slow")
    with errors.refused("tokenizer", "SimpleNamespace"):
        tokenize("text", slow)


def test_a_template_that_rewrites_content_beyond_recognition():
    template = ChatTemplate(tokenizer_for(CHATML.replace("m['content']", "m['content'] | replace('a', 'b')")))
    with errors.dropped("template leaves out content", "the user text (message 1)"):  # no sentinel came through
        tokenize_pair(pair_of(rounds("ab", "cd")), template, RenderSettings(None))


def test_the_walk_over_the_tokens_is_itself_right():
    """byte_ranges, on which every expected mask rests: by hand, `é` is two bytes and `🙂` four."""
    tokenizer = LETTERS.tokenizer
    ids = tokenizer("a é<|im_end|>🙂", add_special_tokens=False)["input_ids"]
    edges = [0, 1, 2, 3, 4, 14, 15, 16, 17, 18]
    assert byte_ranges(tokenizer, ids, "a é<|im_end|>🙂") == list(zip(edges, edges[1:], strict=False))
    spaced = tokenizer_for(CHATML, "always")
    ids = spaced("<|im_start|>x y", add_special_tokens=False)["input_ids"]
    assert byte_ranges(spaced, ids, "<|im_start|>x y")[-1][1] == 15
