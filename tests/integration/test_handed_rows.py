"""Rows in the shapes of public files that once went wrong, two of each in tests/rows, through SmolLM2's tokenizer. What
is right for the first one: the supervised text of chosen, words of the context in order, what is counted or refused."""

import json
from functools import cache

import pytest
from repository import ROOT
from transformers import AutoTokenizer

from mdpo.data.tokenize import tokenize_row
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings

MODEL = ROOT / "models" / "smollm2-135m-instruct"
ROWS = ROOT / "tests/rows"
QUESTION, ANSWER = "Which river runs through Lyon?", "The Rhone does.<|im_end|>"
BRIEFLY = "Answer briefly."
CALL = '<tool_call>{"name": "look_up", "arguments": {"query": "Which river runs through Lyon?"}}</tool_call><|im_end|>'
SEARCH = "Thought: I look it up.\nAction: search[x]<|im_end|>"
# name -> (supervised text, pieces of the context in order, parts of what is said: remarks, unread fields, breaks)
KEPT = {
    "01_question_column": (ANSWER, [QUESTION], []),
    "02_alpaca_preference": (ANSWER, [QUESTION], []),
    "04_orca_system_question": (ANSWER, [BRIEFLY, QUESTION], []),
    "05_messages_and_sides": (ANSWER, [BRIEFLY, QUESTION], []),
    "07_sides_as_json_text": (ANSWER, [QUESTION], ["messages as JSON text"]),
    "09_openai_preference": (ANSWER, [QUESTION], ["tools that the template does not write"]),
    "10_swift_rejected_response": (ANSWER, [QUESTION], []),
    "11_swift_tool_roles": (CALL + ANSWER, [QUESTION, "tool\nThe Rhone does."], []),
    "13_content_parts_value": (ANSWER, [QUESTION], []),
    "17_trailing_environment_turn": (
        SEARCH + ANSWER,
        ["You look words up.", QUESTION, "Observation: nothing new."],
        ["a turn of the environment behind the last answer"],
    ),
    "19_extra_keys_on_messages": (ANSWER, [QUESTION], ["timestamp", "turn_idx"]),
    "21_leading_newlines": (
        "Let me see.<|im_end|>\n\n" + ANSWER,
        [QUESTION, "Go on."],
        ["a turn tokenized apart from its header"],
    ),
    "23_plain_text_transcripts": (
        " Rhone does.\n\nHuman: Thank you for that.\n\nAssistant: With pleasure.<|im_end|>",
        ["Human: " + QUESTION, "Assistant: The"],
        ["no chat template or turn masks", "words that both answers begin with are not supervised", "role marks"],
    ),
    "25_bare_tools_no_ids": (CALL + ANSWER, ["look_up: ", QUESTION, "tool\nThe Rhone does."], []),
    "31_system_moves_with_the_last_user_turn": (ANSWER.replace("<|im_end|>", "<|endoftext|>"), [BRIEFLY, QUESTION], []),
    "32_thoughts_of_earlier_turns": (
        f"<think>\nFIRSTTHOUGHT about it.\n</think>\n\n{ANSWER}"
        f"<think>\nSECONDTHOUGHT about it.\n</think>\n\nYes. {ANSWER}",
        [QUESTION, QUESTION, "assistant\nThe Rhone does.", "Are you sure?"],
        ["earlier thoughts left out by the template"],
    ),
    "33_reasoning_field_ignored": (ANSWER, [QUESTION], ["reasoning_content", "thoughts"]),
    "34_agent_thoughts_dropped": (
        f"<think>CALLTHOUGHT: look it up.</think>{CALL}<think>ANSWERTHOUGHT.</think>{ANSWER}",
        [QUESTION, "tool\nThe Rhone does."],
        [],
    ),
    "35_last_turn_without_its_end": (f"Let me see.<|im_end|>{ANSWER}", [QUESTION, "Go on."], []),
    "36_line_break_before_the_header": (CALL + ANSWER, [QUESTION, "tool\nThe Rhone does.<|im_end|><|im_start|>"], []),
    "40_thoughts_of_the_last_turn_too": (
        f"LONGTHOUGHT about it, step by step.\n</think>\n\nSo: {ANSWER}",
        [QUESTION, "<think>\n"],
        [],
    ),
}
# name -> parts of the reason
DROPPED = {
    "14_anthropic_blocks": ["tool call", "message 2"],  # SmolLM2's template writes none
    "15_responses_items": ["tool call", "message 2"],
    "18_simulated_user": ["message 2", "allow_different_prompts: true"],
    "22_empty_assistant_turn": ["chosen, message 2", "empty assistant turn"],
    "38_text_beside_a_call": ["text beside a tool call", "message 2", "another chat_template"],
    "42_thought_without_an_answer": ["message 2", "thoughts alone"],
}
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="needs models/: scripts/prepare_quickstart.py")


@cache  # a tokenizer's engine is read once
def smollm2(template: str | None) -> ChatTemplate:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template or tokenizer.chat_template
    return ChatTemplate(tokenizer)


def read(name: str, number: int, **changes):
    """One row of a case as `tokenize_row` has it, and the tokenizer."""
    case = json.loads((ROWS / f"{name}.json").read_text(encoding="utf-8")) | changes
    template = smollm2(case.get("chat_template"))
    return tokenize_row(case["rows"][number], number, template, RenderSettings(2048)), template.tokenizer


def text_of(out: dict, tokenizer, bit: int, side: str = "chosen") -> str:
    ids = zip(out[f"{side}_ids"], out[f"{side}_mask"], strict=True)
    return tokenizer.decode([token for token, mask in ids if mask == bit])


def test_each_case_is_kept_or_dropped():
    assert {path.stem for path in ROWS.iterdir()} == set(KEPT) | set(DROPPED)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_right_is_trained_on(name):
    supervised, context, said = KEPT[name]
    for number in (0, 1):
        out, tokenizer = read(name, number)
        assert out["drop_reason"] == ""
        told = "\n".join([*out["remarks"], *out["unread"], *out["chosen_breaks"]])
        assert all(words in told for words in said), told
        if number == 0:
            assert text_of(out, tokenizer, 1) == supervised
            rest = text_of(out, tokenizer, 0)
            places = [rest.find(words) for words in context]
            assert -1 not in places and places == sorted(places), rest
            assert "Danube" in text_of(out, tokenizer, 1, "rejected")


@pytest.mark.parametrize("name", DROPPED)
def test_what_cannot_be_is_dropped_by_a_reason_that_says_where(name):
    for number in (0, 1):
        out, _ = read(name, number)
        assert all(words in out["drop_reason"] for words in DROPPED[name]), out["drop_reason"]
        assert len(out["drop_reason"]) < 160


@pytest.mark.parametrize("name", ["14_anthropic_blocks", "15_responses_items"])
def test_blocks_and_items_are_read_where_a_template_writes_calls(name):
    template = json.loads((ROWS / "25_bare_tools_no_ids.json").read_text(encoding="utf-8"))["chat_template"]
    out, tokenizer = read(name, 0, chat_template=template)
    assert out["drop_reason"] == ""
    supervised = text_of(out, tokenizer, 1)
    assert CALL in supervised and supervised.endswith(ANSWER)
    assert ("Let me look." in supervised) == (name == "14_anthropic_blocks")
    assert "tool\nThe Rhone does." in text_of(out, tokenizer, 0)
