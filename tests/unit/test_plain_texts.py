"""Plain texts under mask_user_turns: what is said of them, where they end, and which hold marks of roles."""

import copy
import json

import errors
import pytest
from datasets import Dataset
from mask_checks import LETTERS, ones
from tiny import CHATML, tokenizer_for
from tokenizers import processors

from mdpo.data.counts import DropCounts
from mdpo.data.rows import row_to_pair
from mdpo.data.tokenize import tokenize_dataset, tokenize_row, tokenize_stream
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.masking.plain_texts import GUESSED, PLAIN, ROLES, PlainText, has_role_marks

OURS, OF_TRL = RenderSettings(None), RenderSettings(None, mask_turns=False)


def tokenized(row, template=LETTERS, settings=OURS):
    return tokenize_pair(row_to_pair(row, settings.mask_turns), template, settings)


def side(text, template=LETTERS, settings=OURS):
    """(the tokens' names behind the prompt `a `, the positions of supervised ones) of an answer."""
    got = tokenized({"prompt": "a ", "chosen": text, "rejected": "zz"}, template, settings)
    return template.tokenizer.convert_ids_to_tokens(got.chosen_ids[2:]), ones(got.chosen_mask)


# ---- where a text ends, with a token a character

ENDS = {  # an answer behind "a " -> its tokens; supervised are all of them
    "b": ["b", "<eos>"],
    "b<eos>": ["b", "<eos>"],
    "b<eos>\n": ["b", "<eos>"],
    "b<eos> \n\n": ["b", "<eos>"],
    "b<|im_end|>": ["b", "<|im_end|>"],
    "b<|im_end|>\n": ["b", "<|im_end|>"],
    "b<|im_end|>\n<eos>\n": ["b", "<|im_end|>", "Ċ", "<eos>"],
    "b\n": ["b", "Ċ", "<eos>"],
    "b<|im_start|>\n": ["b", "<|im_start|>", "Ċ", "<eos>"],  # no end of a turn
}


@pytest.mark.parametrize("text", ENDS)
def test_a_text_ends_once(text):
    assert side(text) == (ENDS[text], list(range(2, 2 + len(ENDS[text]))))


@pytest.mark.parametrize("text", ENDS)
def test_trl_s_rule_is_as_it_was(text):
    """Under a plain DPOConfig everything is kept, and EOS follows unless it ends the text: TRL's rule."""
    tokenizer = LETTERS.tokenizer
    expected = tokenizer("a " + text + "<eos>" * (not text.endswith("<eos>")))["input_ids"]
    got = tokenized({"prompt": "a ", "chosen": text, "rejected": "zz"}, settings=OF_TRL)
    assert (got.chosen_ids, got.remarks) == (expected, [])


@pytest.mark.parametrize("text", ["b", "b<eos>", "b<eos>\n"])
def test_a_tokenizer_that_adds_an_end_of_its_own(text):
    tokenizer = copy.deepcopy(LETTERS.tokenizer)
    both = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=both
    )
    assert tokenizer("b<eos>")["input_ids"][-2:] == [tokenizer.eos_token_id] * 2  # what a text would end with
    got = tokenized({"prompt": "a ", "chosen": text, "rejected": "zz"}, ChatTemplate(tokenizer))
    assert tokenizer.convert_ids_to_tokens(got.chosen_ids) == ["<bos>", "a", "Ġ", "b", "<eos>"]
    assert ones(got.chosen_mask) == [3, 4]


def test_sides_that_differ_behind_their_end_are_equal():
    row = {"prompt": "a ", "chosen": "b<eos>\n", "rejected": "b<eos>"}
    assert tokenize_row(row, 0, LETTERS, OURS)["drop_reason"] == "chosen equals rejected"


def test_without_an_end_token():
    tokenizer = copy.deepcopy(LETTERS.tokenizer)
    tokenizer.eos_token = None
    row = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    with errors.refused("tokenizer", "end-of-sequence"):
        tokenized(row, PlainText(tokenizer))


# ---- marks of roles

MARKED = [
    "\n\nHuman: Hi\n\nAssistant: Yes.",
    "USER: Hi ASSISTANT: Yes.",
    "### Instruction:\nAdd.\n\n### Response:\n4",
    "[INST] Hi [/INST] Yes.",
    "<<SYS>>Be brief<</SYS>> Hi",
    "<|user|>\nHi<|assistant|>\nYes.",
    "<|start_header_id|>user<|end_header_id|>\n\nHi",
    "<start_of_turn>user\nHi",
    "<｜User｜>Hi<｜Assistant｜>Yes.",
    "<|turn>user\nHi",
    "<human>: Hi\n<bot>: Yes.",
    "**User:** Hi\n**Assistant:** Yes.",
    "[|user|]Hi",
    "Yes.<|im_end|>\n<|im_start|>user\nMore?",
    "Yes.<eos> And more",
]
UNMARKED = [
    "Yes.",
    "Yes.<eos>",
    "Yes.<|im_end|>\n",
    "<bos>Yes.<eos>",
    "The human: a study. The user of it says so.",
    "# Answer\n\n## Steps\n1. Add.\n#### 42",
    "if user:\n    print(user)",
    "user: bob\nsystem: linux",
    "model: llama\ntool: hammer",
    "The assistant manager called the system at 10:30.",
    "a < b | c > d, x[1], [link](http://a.b)",
    "def model(x): return x",
]


@pytest.mark.parametrize("kind", [ChatTemplate, PlainText])
def test_texts_with_role_marks(kind):
    template = kind(tokenizer_for(CHATML))
    marked, unmarked = ([has_role_marks(text, template) for text in texts] for texts in (MARKED, UNMARKED))
    # Without a template `<|im_end|>` is a special token like another.
    expected = [False] * len(unmarked) if kind is ChatTemplate else [text == UNMARKED[2] for text in UNMARKED]
    assert (marked, unmarked) == ([True] * len(marked), expected)


# ---- what is said


def counted(*rows, settings=OURS):
    counts = DropCounts("a")
    for i, row in enumerate(rows):
        counts.add(tokenize_row({**row, "key": f"a:{i + 1}"}, i, LETTERS, settings))
    return counts


ROW = {"prompt": "a? ", "chosen": "b", "rejected": "c"}
TALK = {name: f"\n\nHuman: a?\n\nAssistant: The {name}." for name in ("chosen", "rejected")}


def test_plain_texts_say_that_no_turn_masks_apply():
    counts = counted(ROW, TALK)
    assert counts.kept_with == {PLAIN: ["a:1", "a:2"], GUESSED: ["a:2"], ROLES: ["a:2"]}
    assert counts.lines()[1:] == [
        "  kept 2 with plain texts: no chat template or turn masks, all behind the prompt or the common start is "
        "supervised (a:1, a:2)",
        "  kept 1 with plain texts without a prompt: words that both answers begin with are not supervised (a:2)",
        "  kept 1 with role marks in plain texts: write them as messages, or set mask_user_turns: false (a:2)",
    ]
    assert counted(ROW, TALK, settings=OF_TRL).kept_with == {}


def test_conversations_say_nothing_of_it():
    messages = [{"role": "user", "content": "Human: a?"}]
    row = {name: [*messages, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert counted(row).kept_with == {}


def test_a_stream_says_it_once(capsys):
    rows = Dataset.from_list([{**ROW, "key": f"a:{i}"} for i in range(3)]).to_iterable_dataset()
    stream, counts = tokenize_stream(rows, LETTERS.tokenizer, OURS, "a")
    assert len(list(stream)) == 3
    assert capsys.readouterr().out == f"a: kept a:0 with {PLAIN} (further ones are counted)\n"
    assert counts.kept_with == {PLAIN: ["a:0", "a:1", "a:2"]}


def test_messages_as_text_need_a_template():
    """A tokenizer without one does for plain texts alone; messages stored as JSON are none."""
    tokenizer = copy.deepcopy(LETTERS.tokenizer)
    tokenizer.chat_template = None
    ask = {"role": "user", "content": "a?"}
    sides = {name: json.dumps([ask, {"role": "assistant", "content": name}]) for name in ("chosen", "rejected")}
    rows = [Dataset.from_list([{**row, "key": "a:1"}]) for row in (sides, ROW)]
    with errors.refused("chat_template", ".jinja"):
        tokenize_dataset(rows[0], tokenizer, OURS, "a")
    assert tokenize_dataset(rows[1], tokenizer, OURS, "a")[1].kept == 1
