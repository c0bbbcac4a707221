"""An oracle that knows nothing of how rows are read: it draws a conversation of words that occur once, writes it in one
of the public forms, and compares the words of supervised and of context tokens with those that were drawn.

A form is how a row is laid out (FORMS) times how a message is written (STYLES). Nothing of mdpo makes an expectation.
"""

import json
import random
import re
from dataclasses import dataclass, field

import pytest
from tiny import CHATML, tokenizer_for, trl_template

from mdpo.data.tokenize import tokenize_row
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings

WORD = re.compile(r"zw\d{4}q")
QUERY = {"type": "object", "properties": {"query": {"type": "string", "description": "what"}}, "required": ["query"]}
TOOL = {"name": "look_up", "description": "Looks something up.", "parameters": QUERY}


# ---- what is drawn


@dataclass
class Turn:
    who: str  # user, assistant, tool
    text: str
    query: str = ""  # of an assistant's call of TOOL; the tool's turn follows


@dataclass
class Talk:
    """`asked` ends with a user turn, `chosen` and `rejected` begin and end with the assistant's."""

    asked: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    system: str = ""
    tools: bool = False


@dataclass
class Drawn:
    seed: int
    calls: bool
    number: int = field(default=0)

    def words(self) -> str:
        self.number += 3
        return " ".join(f"zw{n:04d}q" for n in range(self.number - 3, self.number))

    def answers(self, turns: int) -> list[Turn]:
        out = []
        for k in range(turns):
            if self.calls and k + 1 < turns:
                out += [Turn("assistant", self.words(), query=self.words()), Turn("tool", self.words())]
            else:
                out += [Turn("assistant", self.words())] + [Turn("user", self.words())] * (k + 1 < turns)
        return out

    def talk(self, asked: int, answered: int, system: bool) -> Talk:
        """`asked` user turns before the sides part, `answered` assistant turns on each side."""
        dice = random.Random(self.seed)
        before = [Turn("user", self.words())]
        for _ in range(asked - 1):
            before += [Turn("assistant", self.words()), Turn("user", self.words())]
        sides = [self.answers(dice.randint(1, answered)) for _ in range(2)]
        return Talk(before, *sides, system=self.words() if system else "", tools=self.calls)


def expected(talk: Talk, side: list[Turn], asked_is_context: bool) -> tuple[list[str], list[str]]:
    """(words of supervised tokens, words of all others), each in the order of the conversation."""
    supervised, context = "", talk.system
    for turn, old in [*((t, True) for t in talk.asked), *((t, False) for t in side)]:
        if turn.who == "assistant" and not (old and asked_is_context):
            supervised += f" {turn.text} {turn.query}"
        else:
            context += f" {turn.text}"
    return WORD.findall(supervised), WORD.findall(context)


# ---- how a message is written


def openai(turns: list[Turn]) -> list[dict]:
    out = []
    for n, turn in enumerate(turns):
        message = {"role": turn.who, "content": turn.text}
        if turn.query:
            function = {"name": "look_up", "arguments": json.dumps({"query": turn.query})}
            message["tool_calls"] = [{"id": f"call{n:05d}", "type": "function", "function": function}]
        if turn.who == "tool":
            message["tool_call_id"] = f"call{n - 1:05d}"
        out.append(message)
    return out


def sharegpt(turns):
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    return [{"from": names[turn.who], "value": turn.text} for turn in turns]


def capitals(turns):
    return [{"role": turn.who.capitalize(), "content": turn.text} for turn in turns]


def value_parts(turns):
    return [{"role": turn.who, "content": [{"type": "text", "value": turn.text}]} for turn in turns]


def response_items(turns):
    out = []
    for n, turn in enumerate(turns):
        if turn.who == "tool":
            out.append({"type": "function_call_output", "call_id": f"c{n - 1}", "output": turn.text})
            continue
        kind = "output_text" if turn.who == "assistant" else "input_text"
        content = [{"type": kind, "text": turn.text}]
        out.append({"type": "message", "role": turn.who, "content": content})
        if turn.query:
            arguments = json.dumps({"query": turn.query})
            out.append({"type": "function_call", "call_id": f"c{n}", "name": "look_up", "arguments": arguments})
    return out


def anthropic(turns):
    out = []
    for n, turn in enumerate(turns):
        blocks = [{"type": "text", "text": turn.text}]
        if turn.query:
            blocks.append({"type": "tool_use", "id": f"toolu{n}", "name": "look_up", "input": {"query": turn.query}})
        if turn.who == "tool":
            blocks = [{"type": "tool_result", "tool_use_id": f"toolu{n - 1}", "content": blocks}]
        out.append({"role": "user" if turn.who == "tool" else turn.who, "content": blocks})
    return out


def langchain(turns):
    names = {"system": "system", "user": "human", "assistant": "ai", "tool": "tool"}
    out = []
    for n, turn in enumerate(turns):
        message = {"type": names[turn.who], "content": turn.text}
        if turn.query:
            message["tool_calls"] = [
                {"name": "look_up", "args": {"query": turn.query}, "id": f"c{n}", "type": "tool_call"}
            ]
        if turn.who == "tool":
            message["tool_call_id"] = f"c{n - 1}"
        out.append(message)
    return out


def swift(turns):
    out = []
    for turn in turns:
        out.append({"role": "tool_response" if turn.who == "tool" else turn.who, "content": turn.text})
        if turn.query:
            call = {"name": "look_up", "arguments": {"query": turn.query}}
            out.append({"role": "tool_call", "content": json.dumps(call)})
    return out


WITH_CALLS = [openai, response_items, anthropic, langchain]
STYLES = [*WITH_CALLS, sharegpt, capitals, value_parts]


# ---- how a row is laid out: (row, whether the turns before the sides part are a prompt of their own)


def whole(talk: Talk, side: list[Turn], style) -> list[dict]:
    system = [Turn("system", talk.system)] if talk.system else []
    return style([*system, *talk.asked, *side])


def both_whole(talk, style):
    return {"chosen": whole(talk, talk.chosen, style), "rejected": whole(talk, talk.rejected, style)}, False


def prompt_and_sides(talk, style):
    return {"prompt": whole(talk, [], style), "chosen": style(talk.chosen), "rejected": style(talk.rejected)}, True


def json_texts(talk, style):
    return {name: json.dumps(value) for name, value in prompt_and_sides(talk, style)[0].items()}, True


def openai_preference(talk, style):
    sides = {"preferred_output": style(talk.chosen), "non_preferred_output": style(talk.rejected)}
    return {"input": {"messages": whole(talk, [], style)}, **sides}, True


def messages_and_sides(talk, style):
    return {"messages": whole(talk, [], style), "chosen": style(talk.chosen), "rejected": style(talk.rejected)}, True


def conversations_and_sides(talk, style):
    row, given = prompt_and_sides(talk, style)
    return {"conversations": row.pop("prompt"), **row}, given


def named_messages(talk, style):
    row, given = both_whole(talk, style)
    return {f"{name}_messages": value for name, value in row.items()}, given


def swift_messages(talk, style):
    row, given = both_whole(talk, style)
    return {"messages": row["chosen"], "rejected_messages": row["rejected"]}, given


def sides_as_objects(talk, style):
    row, given = both_whole(talk, style)
    return {"chosen": {"messages": row["chosen"]}, "rejected": {"conversations": row["rejected"]}}, given


def nemo(talk, style):
    sides = [{"rank": 1, "completion": style(talk.rejected)}, {"rank": 0, "completion": style(talk.chosen)}]
    return {"context": whole(talk, [], style), "completions": sides}, True


def arena(talk, style):
    row, given = both_whole(talk, style)
    return {"conversation_a": row["rejected"], "conversation_b": row["chosen"], "winner": "model_b"}, given


def trajectory(talk, style):
    return {"trajectory": whole(talk, [], style), "chosen": style(talk.chosen), "rejected": style(talk.rejected)}, True


FORMS = [both_whole, prompt_and_sides, json_texts, openai_preference, messages_and_sides, conversations_and_sides,
         named_messages, swift_messages, sides_as_objects, nemo, arena, trajectory]  # fmt: skip


# ---- rows whose answers are texts


def last(turns):
    return turns[-1].text


def alpaca(talk):
    *before, question = talk.asked
    history = [[a.text, b.text] for a, b in zip(before[::2], before[1::2], strict=True)]
    words = question.text.split()
    row = {"instruction": words[0], "input": " ".join(words[1:]), "history": history, "system": talk.system}
    return {**row, "chosen": last(talk.chosen), "rejected": last(talk.rejected)}


def orca(talk):
    return {"system": talk.system, "question": last(talk.asked), "chosen": last(talk.chosen),
            "rejected": last(talk.rejected)}  # fmt: skip


def named_responses(talk):
    return {"system": talk.system, "instruction": last(talk.asked), "chosen_response": last(talk.chosen),
            "rejected_response": last(talk.rejected)}  # fmt: skip


def swift_response(talk):
    return {"messages": whole(talk, talk.chosen, openai), "rejected_response": last(talk.rejected)}


def helpsteer3(talk):
    sides = {"response1": last(talk.rejected), "response2": last(talk.chosen), "overall_preference": 2}
    return {"context": whole(talk, [], openai), **sides}


def ultrafeedback(talk):
    sides = [{"response": last(s), "overall_score": n} for n, s in ((3.0, talk.rejected), (8.5, talk.chosen))]
    return {"instruction": last(talk.asked), "completions": sides}


def prompt_and_texts(talk):
    return {"prompt": whole(talk, [], openai), "chosen": last(talk.chosen), "rejected": last(talk.rejected)}


# (form, user turns before the answer at most, whether it has a place for a system message)
TEXT_FORMS = [(alpaca, 3, True), (orca, 1, True), (named_responses, 1, True), (swift_response, 3, True),
              (helpsteer3, 3, True), (ultrafeedback, 1, False), (prompt_and_texts, 3, True)]  # fmt: skip


# ---- the comparison


def read(row: dict, template: str) -> dict[str, tuple[list[str], list[str]]]:
    tokenizer = tokenizer_for(template)
    out = tokenize_row(row, 0, ChatTemplate(tokenizer), RenderSettings(None))
    assert not out["drop_reason"], out["drop_reason"]
    found = {}
    for side in ("chosen", "rejected"):
        ids, mask = out[f"{side}_ids"], out[f"{side}_mask"]
        parts = ([t for t, m in zip(ids, mask, strict=True) if m == bit] for bit in (1, 0))
        found[side] = tuple(WORD.findall(tokenizer.decode(part)) for part in parts)
    return found


def same(talk: Talk, row: dict, template: str, given: bool) -> None:
    found = read(row, template)
    for side in ("chosen", "rejected"):
        assert found[side] == expected(talk, getattr(talk, side), given), (side, row)


@pytest.mark.parametrize("style", STYLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_conversations(form, style):
    for seed in range(3):
        talk = Drawn(seed, calls=False).talk(asked=1 + seed, answered=3, system=seed != 1)
        row, given = form(talk, style)
        same(talk, row, CHATML, given)


@pytest.mark.parametrize("style", [*WITH_CALLS, swift], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_conversations_with_calls(form, style):
    for seed in range(3):
        talk = Drawn(seed, calls=True).talk(asked=1 + seed, answered=3, system=seed != 1)
        row, given = form(talk, style)
        tools = {"tools": [TOOL] if seed else json.dumps([{"type": "function", "function": TOOL}])}
        row = {**row, "input": {**row["input"], **tools}} if "input" in row else {**row, **tools}
        same(talk, row, trl_template("qwen2_5"), given)


@pytest.mark.parametrize(("form", "asked", "system"), TEXT_FORMS, ids=[f.__name__ for f, *_ in TEXT_FORMS])
def test_texts(form, asked, system):
    for seed in range(3):
        talk = Drawn(seed, calls=False).talk(asked=min(asked, 1 + seed), answered=1, system=system and seed != 1)
        same(talk, form(talk), CHATML, given=True)


def test_the_oracle_notices_a_question_that_is_left_out_and_a_turn_of_the_user_that_is_learned():
    talk = Drawn(0, calls=False).talk(asked=1, answered=3, system=True)
    row, given = both_whole(talk, openai)
    without = {name: [m for m in side if m["role"] != "user"] for name, side in row.items()}
    with pytest.raises(AssertionError):
        same(talk, {"prompt": [{"role": "user", "content": "Go on."}], **without}, CHATML, given)
    learned = {
        name: [{**m, "role": "assistant"} if n > 2 else m for n, m in enumerate(side)] for name, side in row.items()
    }
    with pytest.raises(AssertionError):
        same(talk, learned, CHATML, given)
