"""Row forms that are documented in public: each against a conversation written by hand, through a ChatML tokenizer;
what is ambiguous or holds no question is dropped by name; docs/rows.md and the table in code say the same."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from errors import dropped, is_reason, refused
from odd_values import ODD
from repository import ROOT
from tiny import CHATML, save_workshop, tiny_llama, tokenizer_for

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.data.forms import FORMS, LOOKED_AT, as_preference, look
from mdpo.data.questions import LISTS, TEXTS
from mdpo.data.rows import FROM_JSON, NO_USER, OTHER_SYSTEM, SPACED, TRAILING, row_to_pair
from mdpo.data.sides import SIDE_FORMS
from mdpo.data.sources import load_datasets
from mdpo.data.tokenize import tokenize_dataset, tokenize_row, tokenize_stream
from mdpo.data.unread import NO_QUESTION, Unread
from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.left_out import TOOLS as NO_TOOLS
from mdpo.masking.loss_mask import RenderSettings

DOCS = (ROOT / "docs" / "rows.md").read_text(encoding="utf-8")
NO_PROMPT = "plain texts without a prompt"
Q, G, B = "Which river runs through Lyon?", "The Rhone does.", "The Danube does."
EARLIER, SAID = "Which hill stands over Athens?", "Lycabettus does."
ASK = [("user", Q)]
AFTER = [("user", EARLIER), ("assistant", SAID), *ASK]


def messages(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": text} for role, text in turns]


USER, GOOD, BAD = messages(("user", Q)), messages(("assistant", G)), messages(("assistant", B))
PAST = messages(*AFTER[:2])
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
BOTH = {"chosen": G, "rejected": B}

# (columns of the form, a row, the turns before the answers); further rows of a form have a number behind its columns.
# The answers are G and B, and nothing else is supervised.
SIDE_ROWS = [
    ("chosen rejected", {"prompt": USER, "chosen": GOOD, "rejected": BAD}, ASK),
    ("chosen rejected 1", {"chosen": USER + GOOD, "rejected": USER + BAD, "messages": USER + GOOD}, ASK),
    ("chosen rejected 2", {"question": Q, "chosen": {"messages": GOOD}, "rejected": {"messages": BAD}}, ASK),
    ("chosen rejected 3", {"chosen": {"conversations": sharegpt(*AFTER, ("assistant", G))},
                           "rejected": {"conversations": sharegpt(*AFTER[:2], ("user", Q), ("assistant", B))}}, None),
    ("chosen rejected 4", {"chosen": json.dumps({"messages": USER + GOOD}),
                           "rejected": json.dumps({"messages": USER + BAD})}, ASK),
    ("chosen rejected 5", {"conversations": sharegpt(*AFTER), "chosen": {"from": "gpt", "value": G},
                           "rejected": {"from": "gpt", "value": B}, "system": "Be brief."},
     [("system", "Be brief."), *AFTER]),
    ("chosen rejected 6", {"chosen": {"messages": USER + GOOD, "system": "Be brief."},
                           "rejected": {"messages": USER + BAD, "system": "Be brief."}},
     [("system", "Be brief."), *ASK]),
    ("preferred_output non_preferred_output",
     {"input": {"messages": messages(*AFTER), "tools": TOOLS, "parallel_tool_calls": True}, "preferred_output": GOOD,
      "non_preferred_output": BAD}, AFTER),
    ("chosen_messages rejected_messages", {"chosen_messages": USER + GOOD, "rejected_messages": USER + BAD}, ASK),
    ("chosen_messages rejected_messages 1", {"prompt": Q, "chosen_messages": GOOD, "rejected_messages": BAD}, ASK),
    ("chosen_response rejected_response", {"prompt": Q, "chosen_response": G, "rejected_response": B}, ASK),
    ("chosen_response rejected_response 1",
     {"instruction": Q, "system": None, "chosen_response": G, "rejected_response": B}, ASK),
    ("messages rejected_response", {"messages": messages(*AFTER, ("assistant", G)), "rejected_response": B}, AFTER),
    ("messages rejected_response 1", {"messages": USER + GOOD, "rejected_response": BAD, "system": "Be brief."},
     [("system", "Be brief."), *ASK]),
    ("messages rejected_messages", {"messages": USER + GOOD, "rejected_messages": USER + BAD}, ASK),
    ("messages rejected_messages 1", {"messages": USER + GOOD, "rejected_messages": BAD}, ASK),
    ("response rejected_response",
     {"query": Q, "response": G, "rejected_response": B, "history": [[EARLIER, SAID]]}, AFTER),
    ("response1 response2 overall_preference",
     {"context": messages(*AFTER), "response1": G, "response2": B, "overall_preference": -2}, AFTER),
    ("response1 response2 overall_preference 1",
     {"context": USER, "response1": B, "response2": G, "overall_preference": 1}, ASK),
    ("response_1 response_2 preference_strength",
     {"prompt": f"{EARLIER}\n<extra_id_1>Assistant\n{SAID}\n<extra_id_1>User\n{Q}", "response_1": B, "response_2": G,
      "preference_strength": 3}, AFTER),
    ("completions", {"context": USER, "completions": [{"rank": 2, "completion": BAD}, {"rank": 0, "completion": GOOD},
                                                     {"rank": 1, "completion": messages(("assistant", "x"))}]}, ASK),
    ("completions 1", {"instruction": Q, "models": ["a"], "completions": [
        {"response": "x", "overall_score": 5.0}, {"response": G, "overall_score": 9.0},
        {"response": B, "overall_score": 2.5}]}, ASK),
    ("completions 2", {"instruction": Q, "completions": [
        {"response": B, "annotations": {"honesty": {"Rating": "2"}, "helpfulness": {"Rating": "1"}}},
        {"response": G, "annotations": {"honesty": {"Rating": "4"}, "helpfulness": {"Rating": "5"}}}]}, ASK),
    ("generations ratings", {"input": Q, "generations": [B, G], "ratings": [1.0, 4.0]}, ASK),
    ("responses rewards", {"prompt": Q, "responses": ["x", B, G], "rewards": [0.5, 0.0, 1.0]}, ASK),
    ("conversation_a conversation_b winner",
     {"conversation_a": USER + BAD, "conversation_b": USER + GOOD, "winner": "model_b", "turn": 1}, ASK),
    ("response_a response_b winner", {"question": Q, "response_a": G, "response_b": B, "winner": "model_a"}, ASK),
    ("response_a response_b winner_model_a winner_model_b",
     {"prompt": json.dumps([Q]), "response_a": json.dumps([B]), "response_b": json.dumps([G]), "winner_model_a": 0,
      "winner_model_b": 1, "winner_tie": 0}, ASK),
    ("response_0 response_1 better_response_id",
     {"prompt": Q, "response_0": B, "response_1": G, "better_response_id": 1}, ASK),
    ("answer_0 answer_1 score_0 score_1",
     {"question": {"full_text": Q, "id": "1"}, "answer_0": B, "answer_1": G, "score_0": -1.0, "score_1": 1.0}, ASK),
    ("human_ref_A human_ref_B labels", {"history": Q, "human_ref_A": G, "human_ref_B": B, "labels": 1}, ASK),
    ("response_j response_k", {"question": Q, "response_j": G, "response_k": B, "qid": 5}, ASK),
]  # fmt: skip
LIST_ROWS = [
    ("prompt", {"prompt": messages(*AFTER), **BOTH}, AFTER),
    ("prompt 1", {"prompt": USER, "history": [[EARLIER, SAID]], **BOTH}, AFTER),
    ("conversations", {"conversations": sharegpt(*AFTER), **BOTH}, AFTER),
    ("messages", {"messages": messages(*AFTER), **BOTH}, AFTER),
    ("messages 1", {"messages": json.dumps(USER), "question": f" {Q}", **BOTH}, ASK),
    ("messages 2", {"messages": USER + GOOD, **BOTH}, ASK),
    ("messages 3", {"messages": USER + GOOD, "chosen": GOOD[0], "rejected": BAD[0]}, ASK),
    ("trajectory", {"trajectory": sharegpt(*AFTER), "task": "Coding", "dataset": "x y z", **BOTH}, AFTER),
    ("context", {"context": messages(*AFTER), **BOTH}, AFTER),
    ("context 1", {"context": PAST, "question": Q, **BOTH}, AFTER),
    ("input", {"input": {"messages": messages(*AFTER)}, **BOTH}, AFTER),
    ("input 1", {"input": USER, **BOTH}, ASK),
    ("history", {"history": [[EARLIER, SAID]], "instruction": Q, "input": "", **BOTH}, AFTER),
    ("history 1", {"history": PAST, "question": Q, **BOTH}, AFTER),
    ("history 2", {"history": [[EARLIER, SAID]], "prompt": Q, **BOTH}, AFTER),
    ("history 3", {"history": PAST, "chosen": USER + GOOD, "rejected": USER + BAD}, AFTER),
]
TEXT_ROWS = [
    ("instruction", {"instruction": "Which river", "input": "runs through Lyon?", "history": [], **BOTH},
     [("user", "Which river\nruns through Lyon?")]),
    ("instruction 1", {"instruction": Q, "input": "", "system": "Be brief.", **BOTH}, [("system", "Be brief."), *ASK]),
    ("question", {"question": Q, **BOTH}, ASK),
    ("question 1", {"question": Q, "system": "", **BOTH}, ASK),
    ("question 2", {"question": Q, "system_prompt": "Be brief.", **BOTH}, [("system", "Be brief."), *ASK]),
    ("question 3", {"question": Q, "chosen": GOOD, "rejected": BAD}, ASK),
    ("question 4", {"question": Q, "prompt": None, **BOTH}, ASK),
    ("query", {"query": Q, **BOTH}, ASK),
    ("input", {"input": Q, "system": "Be brief.", "generations": [B, G], "order": ["a", "b"], **BOTH},
     [("system", "Be brief."), *ASK]),
    ("prompt", {"prompt": Q, "system": "Be brief.", **BOTH}, [("system", "Be brief."), *ASK]),
    ("prompt 1", {"prompt": Q, "system": "", **BOTH}, ASK),
    ("prompt 2", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "instruction": "another text of words"}, ASK),
    ("history", {"history": Q, "human_ref_A": B, "human_ref_B": G, "labels": 0}, ASK),
]  # fmt: skip
ROWS = [*SIDE_ROWS, *LIST_ROWS, *TEXT_ROWS]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML, "letters", eos="<|im_end|>")


def read(row, tokenizer, settings=None):
    """(reason, {side: (whole text, supervised text)}, everything) of one row."""
    out = tokenize_row(row, 0, ChatTemplate(tokenizer), settings or RenderSettings(None))
    sides = {}
    for side in ("chosen", "rejected") if not out["drop_reason"] else ():
        ids, mask = out[f"{side}_ids"], out[f"{side}_mask"]
        taught = [i for i, m in zip(ids, mask, strict=True) if m]
        sides[side] = (tokenizer.decode(ids), tokenizer.decode(taught))
    return out["drop_reason"], sides, out


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def by_hand(before, chosen=G, rejected=B):
    return {side: (chatml(*before, ("assistant", answer)), f"{answer}<|im_end|>")
            for side, answer in (("chosen", chosen), ("rejected", rejected))}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "before"), ROWS, ids=[name.replace(" ", "-") for name, _, _ in ROWS])
def test_a_documented_form_is_read_as_written(name, row, before, tokenizer):
    """The text that a policy would see, and its own words in it, by hand; through JSON, as a file holds it."""
    reason, sides, out = read(json.loads(json.dumps(row)), tokenizer)
    assert reason == "" and not set(out["remarks"]) - {NO_TOOLS, FROM_JSON}
    if before is None:  # a conversation without a prompt: every answer behind the first question is taught
        before = AFTER
        wanted = {side: (whole, f"{SAID}<|im_end|>{own}") for side, (whole, own) in by_hand(before).items()}
    else:
        wanted = by_hand(before)
    assert sides == wanted
    swapped = {"chosen": sides["rejected"], "rejected": sides["chosen"]}
    assert swapped != wanted and by_hand(before[:-1]) != wanted  # wrong twins: the other side wins, no question


def test_every_form_is_tested_and_in_the_docs():
    for forms, rows in ((SIDE_FORMS, SIDE_ROWS), (LISTS, LIST_ROWS), (TEXTS, TEXT_ROWS)):
        tested = {re.sub(r" \d$", "", name) for name, _, _ in rows}
        assert tested == {" ".join(form.columns) for form in forms}
    lines = [line for line in DOCS.splitlines() if line.startswith("| `")]
    assert lines == [
        f"| {', '.join(f'`{column}`' for column in form.columns)} | {form.source} | {form.rule} |" for form in FORMS
    ]


@pytest.mark.parametrize(
    ("name", "margin"),
    [("response1 response2 overall_preference", 2.0), ("response_1 response_2 preference_strength", 3.0),
     ("completions", None), ("completions 1", 6.5), ("completions 2", 3.0), ("generations ratings", 3.0),
     ("answer_0 answer_1 score_0 score_1", 2.0), ("question", None)],
)  # fmt: skip
def test_margins_of_scores_and_none_of_ranks(name, margin):
    row = next(row for found, row, _ in ROWS if found == name)
    assert row_to_pair(row).margin == margin
    assert row_to_pair({**row, "margin": 7}).margin == 7.0  # the row's own, wherever there is one


def test_tools_are_carried_from_every_place():
    own = json.dumps(TOOLS)
    openai = next(row for name, row, _ in ROWS if name.startswith("preferred_output"))
    assert row_to_pair(openai).tools == TOOLS
    assert row_to_pair({"question": Q, "tools": own, **BOTH}).tools == TOOLS
    held = {side: {"messages": of, "tools": TOOLS} for side, of in (("chosen", USER + GOOD), ("rejected", USER + BAD))}
    assert row_to_pair(held).tools == TOOLS
    held["rejected"]["tools"] = []
    with dropped("the sides have different tools", "allow_different_prompts"):
        row_to_pair(held)


OTHER = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]
WHOLE = {"chosen": USER + GOOD, "rejected": USER + BAD}


def of(side, **more):
    return {"messages": WHOLE[side], **more}


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({**WHOLE, "tools": TOOLS, "rejected_tools": OTHER}, TOOLS, OTHER),
        ({**WHOLE, "tools": json.dumps(TOOLS), "rejected_tools": json.dumps(OTHER)}, TOOLS, OTHER),
        ({**WHOLE, "rejected_tools": OTHER}, None, OTHER),
        ({**WHOLE, "tools": TOOLS, "rejected_tools": []}, TOOLS, None),
        ({**WHOLE, "tools": TOOLS, "rejected_tools": None}, TOOLS, TOOLS),
        ({**WHOLE, "tools": TOOLS, "rejected_tools": ""}, TOOLS, TOOLS),
        ({**WHOLE, "tools": TOOLS, "rejected_tools": json.dumps(TOOLS)}, TOOLS, TOOLS),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": TOOLS, "rejected_tools": OTHER}, TOOLS, OTHER),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected", tools=OTHER)}, TOOLS, OTHER),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected")}, TOOLS, None),
        ({"chosen": of("chosen"), "rejected": of("rejected", tools=OTHER), "tools": TOOLS}, TOOLS, OTHER),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected"), "tools": TOOLS}, TOOLS, TOOLS),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected"), "rejected_tools": OTHER}, TOOLS, OTHER),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected", tools=[]), "tools": TOOLS}, TOOLS, None),
        ({"chosen": of("chosen", tools=[]), "rejected": of("rejected", tools=[]), "tools": TOOLS}, TOOLS, TOOLS),
        ({"chosen": of("chosen", tools=[]), "rejected": of("rejected")}, None, None),
        ({"chosen": of("chosen", tools=TOOLS), "rejected": of("rejected", tools=json.dumps(TOOLS))}, TOOLS, TOOLS),
    ],
)
def test_sides_with_tools_of_their_own(row, chosen, rejected):
    """Other tools are another prompt: kept only where the recipe allows those."""
    pair = row_to_pair(row, different_prompts=True)
    assert (pair.side("chosen").tools, pair.side("rejected").tools) == (chosen, rejected)
    if chosen == rejected:
        assert row_to_pair(row) == pair and pair.rejected_tools is None
    else:
        with dropped("the sides have different tools", "allow_different_prompts"):
            row_to_pair(row)
    with dropped("both rejected_tools and tools in the sides"):
        row_to_pair({"chosen": of("chosen"), "rejected": of("rejected", tools=OTHER), "rejected_tools": TOOLS})


def test_each_side_is_rendered_with_its_tools(tmp_path):
    from mdpo.config.recipe import load_recipe
    from mdpo.reporting.mask_page import write_page

    template = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + CHATML
    tokenizer, row = tokenizer_for(template, "letters", eos="<|im_end|>"), {**WHOLE, "rejected_tools": OTHER}
    for tools, head in ((TOOLS, "<look_up>"), (None, "")):
        reason, sides, out = read({**row, "tools": tools}, tokenizer, RenderSettings(None, different_prompts=True))
        assert reason == "" and [sides[side][0] for side in ("chosen", "rejected")] == [
            head + by_hand(ASK)["chosen"][0], "<search>" + by_hand(ASK)["rejected"][0]
        ]  # fmt: skip
        assert [own for _, own in sides.values()] == [own for _, own in by_hand(ASK).values()]  # masks have moved along
    save_workshop(tmp_path, tokenizer, f"output_dir: {tmp_path}/out\nallow_different_prompts: true\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "tools": TOOLS}) + "\n", encoding="utf-8")
    recipe = load_recipe([str(tmp_path / "recipe.yaml")])
    assert write_page(tmp_path / "page.html", recipe, tokenizer, 100) == {"kept": 1}  # it asserts the ids trained on


def test_rows_of_a_set_have_one_form_with_and_without_a_system(tokenizer):
    """Half of Orca's systems are empty: such rows are conversations all the same."""
    for system in ("", None, " "):
        assert read({"question": Q, "system": system, **BOTH}, tokenizer)[1] == by_hand(ASK)


PLAIN = {"prompt": "2 + 2 is", "chosen": " 4", "rejected": " 5"}


def test_plain_texts_of_trl_stay_plain_texts():
    for row in (PLAIN, {**PLAIN, "question": "What is 2 + 2?"}, {**PLAIN, "source": "a set of sums"}):
        pair = row_to_pair(row)
        assert (pair.chosen, pair.rejected, pair.n_prompt, pair.remarks) == ("2 + 2 is 4", "2 + 2 is 5", 8, [])
    transcript = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}
    pair = row_to_pair({**transcript, "note": "from a set of sums"})
    assert pair.chosen == transcript["chosen"] and not pair.prompt_given
    for prompt in ("", None, "  "):
        pair = row_to_pair({"prompt": prompt, "chosen": "It is 4", "rejected": "It is 5"})
        assert pair.remarks == ["an empty prompt"] and pair.chosen.strip() == "It is 4"


@pytest.mark.parametrize(
    ("row", "key", "detail"),
    [
        ({**BOTH, "passage": Q}, NO_PROMPT, "column passage,"),
        ({**BOTH, "dialogue": "Lyon?"}, NO_PROMPT, "column dialogue,"),
        ({**BOTH, "turns": USER}, NO_PROMPT, "column turns,"),
        ({**BOTH, "a": {"b": [Q]}}, NO_PROMPT, "column a,"),
        ({"chosen": GOOD, "rejected": BAD, "passage": Q}, NO_QUESTION, "column passage,"),
        ({"chosen": GOOD, "rejected": BAD}, NO_QUESTION, ""),
        ({"chosen": GOOD[0], "rejected": BAD[0], "source": "a set of sums"}, NO_QUESTION, ""),
        ({"chosen": messages(("system", Q)) + GOOD, "rejected": messages(("system", Q)) + BAD}, NO_QUESTION, ""),
    ],
)
def test_sides_without_a_question_are_dropped_by_name(row, key, detail, tokenizer):
    is_reason(read(row, tokenizer)[0], key, detail)
    # TRL trains on them where there is a prompt at all: then they are kept, and counted.
    reason, _, out = read(row, tokenizer, RenderSettings(None, mask_turns=False))
    if isinstance(row["chosen"], str) or len(row["chosen"]) == 2 and isinstance(row["chosen"], list):
        assert reason == "" and out["remarks"][0] == NO_QUESTION
    else:
        is_reason(reason, "the prompt")


@pytest.mark.parametrize("name", ["source", "id", "category", "model", "chosen_model", "prompt_id", "language"])
def test_columns_about_a_row_are_no_question(name):
    assert row_to_pair({**BOTH, name: "of many words indeed"}).chosen == G
    assert row_to_pair({"prompt": USER, **BOTH, "note": "of many words indeed"}).n_prompt == 1


@pytest.mark.parametrize(
    ("row", "key", "details"),
    [
        ({"messages": USER, "question": EARLIER, **BOTH}, "both messages and question", ["`prompt`"]),
        ({"messages": USER, "trajectory": messages(("user", EARLIER)), **BOTH}, "both messages and trajectory", []),
        ({"question": Q, "instruction": EARLIER, **BOTH}, "both instruction and question", ["`prompt`"]),
        ({"question": Q, "context": "Lyon lies on two rivers.", **BOTH}, "both question and context", ["`prompt`"]),
        ({"prompt": Q, "messages": messages(*AFTER), **BOTH}, "both prompt and messages", []),
        ({"prompt": USER, "conversations": PAST, **BOTH}, "both prompt and conversations", []),
        ({"messages": USER + BAD, **BOTH}, "messages", ["the chosen answer"]),
        ({"question": Q, "system": "a", "system_prompt": "b", **BOTH}, "both system and system_prompt", []),
        ({"question": Q, "chosen": f"{Q} {G}", "rejected": f"{Q} {B}"}, "plain texts", ["words of question"]),
        ({"question": Q, "chosen": f"Human: {Q}", "rejected": f"Human: {Q} {B}"}, "plain texts", ["beside question"]),
        ({"history": USER, "chosen": messages(("user", EARLIER)) + GOOD, "rejected": messages(("user", EARLIER)) + BAD},
         "history", []),
        ({"context": USER, "response1": G, "response2": B, "overall_preference": 0}, "a tie", ["response2"]),
        ({"context": USER, "response1": G, "response2": B, "overall_preference": None}, "overall_preference", ["null"]),
        ({"instruction": Q, "completions": [{"response": G, "overall_score": 1}, {"response": B, "overall_score": 1}]},
         "a tie", ["all completions"]),
        ({"instruction": Q, "completions": [{"response": G, "overall_score": 1}]},
         "fewer than two completions with a score", []),
        ({"instruction": Q, "completions": [{"response": G}, {"response": B}]}, "completions", ["rank", "ratings"]),
        ({"conversation_a": USER + GOOD, "conversation_b": USER + BAD, "winner": "tie (bothbad)"},
         "a tie", ["conversation_a", "conversation_b"]),
        ({"conversation_a": USER + GOOD, "conversation_b": USER + BAD, "winner": "x"}, "winner", ["model_a", ": x"]),
        ({"prompt": Q, "response_0": G, "response_1": B, "better_response_id": 2}, "better_response_id", ["0 nor 1"]),
        ({"messages": GOOD, "rejected_response": B}, "no user turn in messages", []),
        ({"prompt": USER, "completion": GOOD, "label": True}, "not a pair", ["completion, label, prompt"]),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_dropped_by_name(row, key, details):
    with dropped(key, *details):
        row_to_pair(row)


def test_no_odd_value_in_a_column_of_a_form_ends_a_run():
    """Each column of each form holds each odd value in turn: read, or dropped by name."""
    reasons = set()
    for name, row, _ in ROWS:
        for column, odd in ((column, odd) for column in row for odd in ODD):
            try:
                row_to_pair({**row, column: odd})
            except DropPair as reason:
                reasons.add(str(reason))
            except Exception as error:
                raise AssertionError(f"{name}: {column}: {odd!r:.80}") from error
    assert len(reasons) > 50


def test_the_same_words_in_two_columns_are_no_contradiction():
    for row in (
        {"prompt": Q, "messages": messages(("system", "Be brief."), ("user", Q)), **BOTH},
        {"prompt": Q, "messages": USER + GOOD, **BOTH},
    ):
        assert row_to_pair(row).chosen == Q + G  # TRL's plain texts
    assert row_to_pair({"messages": USER, "trajectory": sharegpt(("user", f"{Q} ")), **BOTH}).chosen == USER + GOOD
    sft = {"prompt": Q, "chosen": USER + GOOD, "rejected": USER + BAD, "messages": USER + BAD, "question": "x y z"}
    assert row_to_pair(sft).chosen == USER + GOOD


# ------------------------------------------------------------------------------------------ prompts, greetings, ends

HELLO = ("assistant", "Hello, how can I help?")


@pytest.mark.parametrize("system", [[], [("system", "Be brief.")]])
def test_a_greeting_is_context(system, tokenizer):
    start = [*system, HELLO, *ASK]
    row = {"chosen": messages(*start, ("assistant", G)), "rejected": messages(*start, ("assistant", B))}
    for more in ({}, {"question": Q}, {"prompt": Q}, {"messages": messages(*start)}):
        reason, sides, out = read({**row, **more}, tokenizer)
        assert (reason, sides) == ("", by_hand(start)), more
    other = messages(*system, HELLO, ("user", EARLIER), ("assistant", G))
    keys = {read(r, tokenizer)[2]["prompt_key"] for r in (row, {"chosen": other, "rejected": [*other[:-1], *BAD]})}
    assert len(keys) == 2  # held out by question, not by greeting


def test_a_greeting_that_differs():
    hi = ("assistant", "Hi.")
    row = {"chosen": messages(HELLO, *ASK) + GOOD, "rejected": messages(hi, *ASK) + BAD}
    with dropped("prompt mismatch", "message 1 "):
        row_to_pair(row)
    assert row_to_pair(row, different_prompts=True).n_prompt == 2
    row["rejected"] = USER + BAD
    with dropped("prompt mismatch", "greeting"):
        row_to_pair({**row, "chosen": messages(("system", "x"), HELLO, *ASK) + GOOD}, different_prompts=True)


def test_a_template_that_wants_the_user_first_says_so_itself():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    row = {"chosen": messages(HELLO, *ASK) + GOOD, "rejected": messages(HELLO, *ASK) + BAD}
    reason, _, _ = read(row, tokenizer_for(strict, "letters", eos="<|im_end|>"))
    is_reason(reason, "template refuses the conversation", "the user begins")


def test_what_follows_the_last_answer_is_left_out_and_counted(tokenizer):
    end = messages(("user", "Episode finished, reward = 1"))
    done = messages(("tool", "submitted"))
    row = {"chosen": USER + GOOD + end, "rejected": USER + BAD + done + end}
    reason, sides, out = read(row, tokenizer)
    assert (reason, sides, out["remarks"]) == ("", by_hand(ASK), [TRAILING])
    assert row_to_pair({"prompt": USER, "chosen": GOOD + end, "rejected": BAD}).remarks == [TRAILING]
    weighted = [{**GOOD[0], "weight": 2}]
    pair = row_to_pair({"chosen": USER + weighted + end, "rejected": USER + BAD + done})
    assert (pair.chosen, pair.weights) == (USER + GOOD, ([1.0, 2.0], []))
    assert len(row_to_pair(row, mask_turns=False).chosen) == 3  # TRL's rule trains on it


def test_prompts_that_differ_in_white_space_or_fields_are_one_prompt(tokenizer):
    spaced = [{"role": "user", "content": f"{Q}\n", "timestamp": "11:00"}]
    reason, sides, out = read({"chosen": USER + GOOD, "rejected": spaced + BAD}, tokenizer)
    assert (reason, sides, out["remarks"]) == ("", by_hand(ASK), [SPACED])
    pair = row_to_pair({"chosen": spaced + GOOD, "rejected": USER + BAD})
    assert pair.rejected[0] == pair.chosen[0] and pair.chosen[0]["content"] == f"{Q}\n"
    asked = row_to_pair({"prompt": messages(("system", Q)), "chosen": GOOD, "rejected": BAD})
    assert asked.remarks == [NO_USER]


# ------------------------------------------------------------------------------------------------------- whole sets


def test_a_set_whose_question_is_unread_is_refused_before_it_is_tokenized(tokenizer):
    rows = [{**BOTH, "passage": f"{Q} {n}"} for n in range(9)] + [BOTH]
    for take in (lambda: tokenize_dataset(Dataset.from_list(rows), tokenizer, RenderSettings(None), "a"),
                 lambda: tokenize_stream(IterableDataset.from_generator(lambda: iter(rows)), tokenizer,
                                         RenderSettings(None), "a")):  # fmt: skip
        with refused("dataset", "dataset a: ", "column passage", "prompt"):
            take()
    few = [{**PLAIN, "passage": Q}] * 3 + [{**BOTH, "passage": Q}]
    _, counts = tokenize_dataset(Dataset.from_list(few), tokenizer, RenderSettings(None), "a")
    assert [len(keys) for keys in counts.reasons.values()] == [1]
    with refused("dataset", "dataset a: ", "chosen or rejected", ": answer."):
        look([{"answer": Q}], "a")
    assert look(iter([PLAIN] * LOOKED_AT + [{"answer": Q}]), "a")[1] is False


def test_columns_that_a_form_reads_are_not_called_unused():
    used, conversations = look([{"question": Q, "system": "", "note": "x", **BOTH}], "a")
    assert conversations and {"question", "system", "chosen"} <= used and "note" not in used
    assert as_preference({"instruction": Q, "input": "x", **BOTH})["used"] >= {"instruction", "input"}


@pytest.mark.parametrize("config", [{}, {"mask_user_turns": False}])
def test_the_trainer_reads_forms_in_raw_rows(config, tokenizer, tmp_path):
    args = MDPOConfig(
        str(tmp_path), max_length=256, bf16=False, use_cpu=True, report_to="none", fused_ops=False, **config
    )
    rows = Dataset.from_list([{"system": "", "question": Q, **BOTH}] * 2)
    trainer = DPOTrainer(tiny_llama(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["chosen_ids"]) == chatml(*ASK, ("assistant", G))
    taught = [i for i, m in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if m]
    assert tokenizer.decode(taught).rstrip("\n") == f"{G}<|im_end|>"


# ------------------------------------------------------------------------------------------ what is in no form at all


def refusal(tmp_path, rows, *columns: str) -> str:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with refused("dataset", tmp_path / "a.jsonl", *columns) as error:
        load_datasets({str(tmp_path / "a.jsonl"): 1.0}, ["train"])
    return str(error.value)


def converted(said: str, tmp_path, monkeypatch) -> list[dict]:
    """The rows that the lines of an error make of the set that it names."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(line[4:] for line in said.splitlines() if line.startswith("    "))
    exec(code, {})
    return [json.loads(line) for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_lines_of_an_error_convert_unknown_columns(tmp_path, monkeypatch, tokenizer):
    said = refusal(tmp_path, [{"problem": Q, "positive": G, "negative": B}], "chosen or rejected",
                   ": problem, positive, negative.")  # fmt: skip
    [row] = converted(said, tmp_path, monkeypatch)
    assert read(row, tokenizer)[1] == by_hand(ASK)


@pytest.mark.parametrize(("good", "bad"), [({"reward": 1.0}, {"reward": 0.0}), ({"success": True}, {"success": False}),
                                           ({"outcome": "success"}, {"outcome": "failure"})])  # fmt: skip
def test_lines_of_an_error_pair_trajectories(good, bad, tmp_path, monkeypatch, tokenizer):
    rows = [{"task_id": 1, "messages": USER + BAD, **bad}, {"task_id": 1, "messages": USER + GOOD, **good},
            {"task_id": 2, "messages": USER + GOOD, **good}]  # fmt: skip
    said = refusal(tmp_path, rows, "trajectories with a verdict", ": task_id, messages")
    [row] = converted(said, tmp_path, monkeypatch)
    assert read(row, tokenizer)[1] == by_hand(ASK)


def test_lines_of_an_error_pair_labelled_answers(tmp_path, monkeypatch, tokenizer):
    rows = [{"prompt": USER, "completion": GOOD, "label": True}, {"prompt": USER, "completion": BAD, "label": False}]
    said = refusal(tmp_path, rows, "KTO", ": prompt, completion, label.")
    [row] = converted(said, tmp_path, monkeypatch)
    assert read(row, tokenizer)[1] == by_hand(ASK)


def test_lines_in_the_docs_pair_trajectories(tmp_path, monkeypatch, tokenizer):
    rows = [{"task_id": 1, "messages": USER + of, "reward": r} for of, r in ((BAD, 0), (GOOD, 1))]
    (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code = DOCS.partition("```python\n")[2].partition("```")[0]
    said = "\n".join(f"    {line}" for line in code.splitlines())
    [row] = converted(said, tmp_path, monkeypatch)
    assert read(row, tokenizer)[1] == by_hand(ASK)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("文本", "请问里昂有哪条河流过？"),
        ("text", "リヨンを流れる川はどれですか"),
        ("source_text", "Translate this long sentence"),
        ("model_input", "Which river?"),
        ("source_prompt", "Which river?"),
        ("source", "Der Hund ist heute schwarz."),
        ("topic", "Which river runs through Lyon?"),
    ],
)
def test_a_question_in_a_script_without_spaces_or_under_a_name_that_is_about_rows(column, text):
    with refused(NO_PROMPT, f"column {column},", kind=Unread):
        as_preference({column: text, "chosen": "It is A.", "rejected": "It is B."})


def test_columns_about_a_row_that_hold_no_sentence():
    about = {"source": "ultra feedback set", "prompt_id": "a b c d", "类别": "数学", "input_tokens": 7}
    assert as_preference({**about, "chosen": "It is A.", "rejected": "It is B."})["remarks"] == []


def test_two_system_texts_or_two_lists_of_tools():
    both = {side: [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": side}] for side in ("a", "b")}
    sides = {"chosen": both["a"], "rejected": both["b"]}
    first = {"role": "system", "content": "Be brief."}
    for row in ({"prompt": [first], **sides}, {name: [first, *side] for name, side in sides.items()}):
        assert row_to_pair({**row, "system": " Be brief. "}).chosen[:2] == [first, both["a"][0]]
        assert row_to_pair({**row, "system": "Be brief."}).remarks == []
        told = row_to_pair({**row, "system": "Be long."})
        assert (told.chosen[0], told.remarks) == (first, [OTHER_SYSTEM])
    tool, other = ({"name": name, "parameters": {}} for name in "fg")
    objects = {name: {"messages": side, "tools": [tool]} for name, side in sides.items()}
    assert row_to_pair({**objects, "tools": json.dumps([tool])}).tools[0]["function"] == tool
    with dropped("both tools and tools in the sides"):
        row_to_pair({**objects, "tools": [other]})
    asked = {"input": {"messages": both["a"][:1], "tools": [tool]}, "preferred_output": both["a"][1:],
             "non_preferred_output": both["b"][1:]}  # fmt: skip
    assert row_to_pair({**asked, "tools": json.dumps([tool])}).tools[0]["function"] == tool
