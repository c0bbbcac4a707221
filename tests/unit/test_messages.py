"""Messages of other formats → messages as chat templates want them, through to tokens and masks."""

import copy
import json
from dataclasses import replace

import pytest
from errors import dropped
from tiny import CHATML, tokenizer_for, trl_template

from mdpo.data.messages import conversation, normalize_messages, read_messages, role_of
from mdpo.data.rows import FROM_JSON, row_to_pair
from mdpo.data.template_fit import MADE_UP, MISSING, REPLACED
from mdpo.data.tokenize import tokenize_row
from mdpo.data.tool_calls import linked, read_tools
from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings
from mdpo.masking.sequences import UNSUPPLIED
from mdpo.masking.sides import ENDS

U, A, B = (
    {"role": "user", "content": "Q?"},
    {"role": "assistant", "content": "A."},
    {"role": "assistant", "content": "B."},
)
SETTINGS = RenderSettings(None)
BEGINS = ("chosen", "begins as messages")
PYTHONS = ("chosen", "Python", "json.dumps")
# As Mistral's: refuses ids that are not nine long, and writes them.
NINE = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids of length 9!') }}{% endif %}"
    "{{ '<|im_start|>assistant\n' + c.function.name + (c.function.arguments | tojson) + ID + '<|im_end|>\n' }}"
    "{% endfor %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITES, HIDES = NINE.replace("ID", "' ' + c.id"), NINE.replace("ID", "''")
# Writes an id where there is one, and can do without.
OPTIONAL = WRITES.replace("{% if c.id is not defined or c.id | length != 9 %}", "{% if false %}").replace(
    "' ' + c.id", "(c.id or '')"
)


def call(name="f", call_id=None, **arguments):
    own = {"id": call_id} if call_id else {}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*of, content="", **fields):
    return {"role": "assistant", "content": content, "tool_calls": list(of), **fields}


def tool(content, call_id=None, **fields):
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {}), **fields}


def drops(key: str, *details, of: list) -> None:
    with dropped(key, *details):
        normalize_messages(of)


def chat(template: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_for(template))


def out(chosen, template, rejected=(U, B), **row):
    return tokenize_row({"chosen": list(chosen), "rejected": list(rejected), **row}, 0, template, SETTINGS)


def supervised(found, template, side="chosen") -> str:
    ids = [t for t, m in zip(found[f"{side}_ids"], found[f"{side}_mask"], strict=True) if m]
    return template.tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------ messages as JSON text


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        lambda m: json.dumps(m, indent=2),
        lambda m: json.dumps(json.dumps(m)),
        lambda m: "\n " + json.dumps({"messages": m}),
        lambda m: json.dumps([json.dumps(one) for one in m]),
        lambda m: [json.dumps(one) for one in m],
    ],
    ids=["list", "indented", "twice", "object", "texts in a text", "texts"],
)
@pytest.mark.parametrize(
    "messages", [[U, A], [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], [U, calls(call(x=1))]]
)
def test_messages_that_came_as_json(messages, write):
    assert conversation(write(messages)) == messages
    whole = {"chosen": messages, "rejected": [U, B]}
    found = row_to_pair({**whole, "chosen": write(messages)})
    assert FROM_JSON in found.remarks or isinstance(write(messages), list)
    assert replace(found, remarks=[]) == row_to_pair(whole)


def test_one_message_as_json_and_prompts_as_json():
    row = {"prompt": json.dumps(U), "chosen": json.dumps(A), "rejected": "B."}
    found, whole = row_to_pair(row), row_to_pair({"prompt": [U], "chosen": [A], "rejected": [B]})
    assert found.remarks == [FROM_JSON] and replace(found, remarks=[]) == whole
    assert row_to_pair({**row, "chosen": "A."}) == whole


ANSWERS = ['{"a": 1}', "[1, 2]", "[]", "{}", '"Yes," he said.', '[{"role": "cook", "name": "Ann"}]',
           "[x for x in y]", '{"type": "function", "name": "f", "value": 1}', '{"role": "user"}',
           '{"role": "assistant", "name": "R2"}', '[{"role": "cook", "na', '{"content": "x", "role"',
           "{'role': 'cook'}", '[{"type": "point", "x": 1}]']  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_in_json_stay_texts(answer):
    found = row_to_pair({"prompt": [U], "chosen": answer, "rejected": "B."})
    assert found.chosen[-1] == {"role": "assistant", "content": answer}
    assert row_to_pair({"prompt": "Q?", "chosen": answer, "rejected": "B."}).chosen == "Q?" + answer
    assert normalize_messages([U, {"role": "assistant", "content": answer}])[1]["content"] == answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([U, A])[:-9], BEGINS),
        ('[{"content": "Q?", "role": "user"}, {', BEGINS),
        (json.dumps(json.dumps([U, A]))[:-9], BEGINS),
        (json.dumps(A)[:-1], BEGINS),
        (repr([U, A]), PYTHONS),
        (repr([{"content": "Q?", "role": "User"}]), PYTHONS),
        (json.dumps([U, {"role": "robot", "content": "x"}]), ("unknown role", "chosen, message 2: ", ": robot")),
        (json.dumps([U, None]), ("null in place of a message", "chosen, message 2: ")),
    ],
)
def test_texts_that_are_nearly_messages_are_not_trained_on(text, reason):
    prompted = [{"prompt": [U], "chosen": text, "rejected": rejected} for rejected in ("B.", text)]
    for row in (*prompted, {"chosen": text, "rejected": text}):
        with dropped(*reason):
            row_to_pair(row)


def test_a_question_in_a_column_of_its_own_is_looked_at_too():
    """And a column that nothing reads may hold what it likes."""
    row = {"question": repr([U]), "chosen": "A.", "rejected": "B."}
    with dropped("question", *PYTHONS[1:]):
        row_to_pair(row)
    row = {"prompt": [U], "chosen": "A.", "rejected": "B.", "log": repr([U])}
    assert tokenize_row(row, 0, chat(CHATML), SETTINGS)["drop_reason"] == ""


def test_content_parts_that_came_as_json():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
    found = read_messages([{"role": "user", "content": json.dumps(parts)}, A])
    assert (found.messages, list(found.remarks)) == ([U, A], ["content parts that were JSON texts"])
    told = row_to_pair({"prompt": [{"role": "user", "content": json.dumps(parts)}], "chosen": [A], "rejected": [B]})
    assert told.remarks == ["content parts that were JSON texts"]
    seen = tool(json.dumps(parts))  # what the policy read in its context
    assert read_messages([seen]).messages == [seen]
    drops("content", "message 1: ", "JSON", of=[{"role": "user", "content": repr(parts)}])


# ------------------------------------------------------------------------------------------------------------- formats

THREE = [U, calls(call("f", "c1", x=1), content="Let me look."), tool("12", "c1"), A]  # what each format below says


def test_responses_items_of_one_answer_are_one_turn():
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Q?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}]},
        {"type": "function_call", "id": "fc", "call_id": "c1", "name": "f", "arguments": '{"x": 1}', "status": "done"},
        {"type": "function_call", "id": "fd", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "12"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "13"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "A."}]},
    ]  # fmt: skip
    found = read_messages(items)
    both = [call("f", "c1", x=1), call("g", "c2")]
    answer = calls(*both, content="Let me look.", reasoning_content="Hm.")
    assert found.messages == [U, answer, tool("12", "c1"), tool("13", "c2"), A]
    assert list(found.unread) == ["reasoning_content"]
    items[1] |= {"content": None, "summary": [{"type": "summary_text", "text": "Hm."}]}  # as NeMo Gym writes thoughts
    assert read_messages(items).messages == found.messages
    assert normalize_messages([U, items[3], items[4]])[1] == calls(*both)
    assert normalize_messages([U, A, B]) == [U, A, B]  # two answers stay two
    drops("unknown role", "message 2: ", "{type: web_search_call}", of=[U, {"type": "web_search_call"}])
    drops("an assistant turn of thoughts alone", "message 2: ", of=[U, items[1], U])


def test_anthropic_blocks():
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
    said, thought = {"type": "text", "text": "Let me look."}, {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "12"}]}
    messages = [U, {"role": "assistant", "content": [said, use]}, {"role": "user", "content": [result]}, A]
    assert normalize_messages(messages) == THREE
    other = {"type": "tool_result", "tool_use_id": "c2", "content": "13", "is_error": True}
    messages[1]["content"] = [thought, said, use, {**use, "id": "c2"}]
    messages[2]["content"] = [result, other, {"type": "text", "text": "Go on."}]
    found = read_messages([{"role": "system", "content": [{"type": "text", "text": "S"}]}, *messages])
    assert found.messages == [
        {"role": "system", "content": "S"},
        U,
        calls(call("f", "c1", x=1), call("f", "c2", x=1), content="Let me look.", reasoning_content="Hm."),
        tool("12", "c1"),
        tool("13", "c2"),
        {"role": "user", "content": "Go on."},
        A,
    ]
    assert list(found.unread) == ["reasoning_content", "is_error"]
    hidden = {
        "role": "assistant",
        "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "A."}],
    }
    found = read_messages([U, hidden])
    assert (found.messages, list(found.unread)) == ([U, A], ["redacted_thinking"])
    drops("a text behind a call", "message 2: ", of=[U, {"role": "assistant", "content": [use, said]}])
    drops("a call in a user message", "message 1: ", of=[{"role": "user", "content": [use]}])
    part = {"type": "server_tool_use"}
    drops("content part", "message 2: ", "{type: server_tool_use}", of=[U, {"role": "assistant", "content": [part]}])


def test_langchain():
    request = {"name": "f", "args": {"x": 1}, "id": "c1", "type": "tool_call"}
    plain = [
        {"type": "human", "content": "Q?", "additional_kwargs": {}, "example": False},
        {"type": "ai", "content": "Let me look.", "tool_calls": [request], "invalid_tool_calls": []},
        {"type": "tool", "content": "12", "tool_call_id": "c1"},
        {"type": "AIMessageChunk", "content": "A."},
    ]

    def bare(messages):
        return [
            {k: v for k, v in m.items() if k in ("role", "content", "tool_calls", "tool_call_id")} for m in messages
        ]

    assert bare(normalize_messages(plain)) == THREE
    assert read_messages(plain).unread == {}
    assert bare(normalize_messages([{"type": m["type"], "data": m} for m in plain])) == THREE
    names = ("HumanMessage", "AIMessage", "ToolMessage", "AIMessage")
    packed = [
        {
            "lc": 1,
            "type": "constructor",
            "id": ["langchain", "schema", name],
            "kwargs": {k: m[k] for k in m if k != "type"},
        }
        for name, m in zip(names, plain, strict=True)
    ]
    assert bare(normalize_messages(packed)) == THREE
    blocks = {**plain[1], "content": [{"type": "text", "text": "Let me look."},
                                      {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}]}  # fmt: skip
    assert bare(normalize_messages([plain[0], blocks, *plain[2:]])) == THREE  # both say the same call


def test_gemini_and_bedrock():
    gemini = [
        {"role": "user", "parts": [{"text": "Q?"}]},
        {"role": "model", "parts": [{"text": "Let me look."}, {"functionCall": {"name": "f", "args": {"x": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"sum": 12}}}]},
        {"role": "model", "parts": [{"text": "A."}]},
    ]
    wanted = [U, calls(call("f", x=1), content="Let me look."), tool('{"sum": 12}', name="f"), A]
    assert normalize_messages(gemini) == wanted
    drops("content part", "message 1: ", "{inlineData}", of=[{"role": "user", "parts": [{"inlineData": {}}]}])
    bedrock = [
        {"role": "user", "content": [{"text": "Q?"}]},
        {"role": "assistant", "content": [{"text": "Let me look."},
                                          {"toolUse": {"toolUseId": "c1", "name": "f", "input": {"x": 1}}}]},
        {"role": "user", "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "12"}]}}]},
        {"role": "assistant", "content": [{"text": "A."}]},
    ]  # fmt: skip
    assert normalize_messages(bedrock) == THREE


def test_calls_in_messages_of_their_own():
    """ms-swift's roles, several calls at once, beside a text or not; ShareGPT's function_call."""
    f, g = ({"role": "tool_call", "content": json.dumps({"name": n, "arguments": {"x": 1}})} for n in "fg")
    outputs = [{"role": "tool_response", "content": "12"}, {"role": "tool_response", "content": {"sum": 13}}]
    wanted = [tool("12"), tool('{"sum": 13}'), A]
    assert normalize_messages([U, f, g, *outputs, A]) == [U, calls(call("f", x=1), call("g", x=1)), *wanted]
    text = {"role": "assistant", "content": "Let me look."}
    found = normalize_messages([U, text, f, *outputs, A])
    assert found == [U, calls(call("f", x=1), content="Let me look."), *wanted]
    shared = [{"from": "gpt", "value": "Let me look."}, {"from": "function_call", "value": json.loads(f["content"])}]
    assert normalize_messages([U, *shared])[1:] == found[1:2]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "Human", "content": "Q?"}, U),
        ({"role": "USER", "message": "Q?"}, U),
        ({"role": " User ", "content": [{"type": "text", "value": "Q?"}]}, U),
        ({"speaker": "user", "text": "Q?"}, U),
        ({"author": "user", "content": "Q?"}, U),
        ({"role": "user", "content": [{"type": "text", "text": {"value": "Q?", "annotations": []}}]}, U),
        ({"from": "GPT", "value": "A."}, A),
        ({"role": "CHATBOT", "message": "A."}, A),
        ({"role": "ai", "content": "A."}, A),
        ({"role": "assistant", "content": None, "refusal": "A."}, A),
        ({"role": "SYSTEM", "content": "S"}, {"role": "system", "content": "S"}),
    ],
)
def test_roles_and_contents_under_other_names(message, wanted):
    assert normalize_messages([message]) == [wanted]
    assert role_of(message) == wanted["role"]


@pytest.mark.parametrize(
    ("output", "text"),
    [({"t": 21, "where": "Zürich"}, '{"t": 21, "where": "Zürich"}'), ([1, None], "[1, null]"), ([], "[]"), (5, "5"),
     (True, "true"), (None, ""), ("x", "x"), ([{"type": "hotel"}], '[{"type": "hotel"}]'),
     ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "xy")],
)  # fmt: skip
def test_what_a_tool_gave_is_written_as_json(output, text):
    assert normalize_messages([U, calls(call(x=1)), {"role": "tool", "content": output}])[2] == tool(text)


# ----------------------------------------------------------------------------------------------- arguments, tools, ids


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"x": 1}, {"x": 1}),
        ('{"x": 1}', {"x": 1}),
        (json.dumps('{"x": 1}'), {"x": 1}),
        (json.dumps(json.dumps('{"x": 1}')), {"x": 1}),
        ({"x": '{"y": 1}'}, {"x": '{"y": 1}'}),  # a text that is an argument stays one
        ("", {}),
        (None, {}),
        ("[1]", ("tool call arguments", "a list")),
        ([1], ("tool call arguments", "a list")),
        ("5", ("tool call arguments", "a number")),
        ('"Paris"', ("tool call arguments", "JSON")),
        ("{'x': 1}", ("tool call arguments", "JSON")),
    ],
)
def test_arguments_become_one_object(arguments, found):
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    if isinstance(found, tuple):
        drops(*found, "message 2: ", of=[U, message])
    else:
        assert normalize_messages([message]) == [calls({**call(), "function": {"name": "f", "arguments": found}})]
    many = {"role": "assistant", "tool_calls": json.dumps(json.dumps(message["tool_calls"]))}
    if isinstance(found, dict):
        assert normalize_messages([many]) == normalize_messages([message])


SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "F.", "parameters": SCHEMA}


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": FUNCTION}],
        [{"function": FUNCTION}],
        [FUNCTION],
        FUNCTION,
        [{"type": "function", **FUNCTION}],
        [{"name": "f", "description": "F.", "input_schema": SCHEMA}],
        [{"name": "f", "description": "F.", "inputSchema": SCHEMA}],
        [{**FUNCTION, "parameters": json.dumps(SCHEMA)}],
        [{"functionDeclarations": [FUNCTION]}],
        [json.dumps(FUNCTION)],
        json.dumps([FUNCTION]),
        json.dumps(json.dumps([FUNCTION])),
    ],
    ids=str,
)
def test_tools_are_wrapped_functions(tools):
    assert read_tools(tools) == [{"type": "function", "function": FUNCTION}]


def test_tools_that_are_none():
    assert [read_tools(value) for value in (None, [], "", "null", "[]")] == [None] * 5
    assert read_tools([{"type": "code_interpreter"}]) == [{"type": "code_interpreter"}]
    for value, detail in ((["f"], "JSON"), ([5], "a list of objects"), ("{", "JSON")):
        with dropped("tools", detail):
            read_tools(value)


def test_linked_gives_ids_in_order_and_once():
    messages = [U, calls(call("f"), call("g", "call00001")), tool("1"), tool("2"), A, U, calls(call("f")), tool("3"), A]
    before = copy.deepcopy(messages)
    found = linked(messages)
    assert [c["id"] for m in found for c in m.get("tool_calls", ())] == ["call00002", "call00001", "call00003"]
    assert [m["tool_call_id"] for m in found if m["role"] == "tool"] == ["call00002", "call00001", "call00003"]
    assert messages == before and linked(found) == found
    strict = linked(
        [U, calls(call("f", "toolu_1"), call("g", "abcdefgh9")), tool("1", "abcdefgh9"), tool("2", "toolu_1")], True
    )
    assert [c["id"] for c in strict[1]["tool_calls"]] == ["call00001", "abcdefgh9"]
    assert [m["tool_call_id"] for m in strict[2:]] == ["abcdefgh9", "call00001"]


@pytest.mark.parametrize(
    ("template", "own", "written", "remarks"),
    [
        (HIDES, None, "", []),
        (HIDES, "toolu01", "", []),
        (WRITES, None, " call00001", [MADE_UP]),
        (WRITES, "toolu01", " call00001", [REPLACED]),
        (WRITES, "abcdefgh9", " abcdefgh9", []),
        (OPTIONAL, None, "", [MISSING]),
        (OPTIONAL, "toolu01", "toolu01", []),
    ],
    ids=["hides", "hides others", "writes", "writes others", "own", "optional", "optional own"],
)
def test_ids_are_made_up_only_where_the_template_asks(template, own, written, remarks):
    template = chat(template)
    found = out([U, calls(call("f", own, x=1)), tool("12", own), A], template)
    assert (found["drop_reason"], found["remarks"]) == ("", remarks)
    assert supervised(found, template) == f'f{{"x": 1}}{written}<|im_end|>A.<|im_end|>'


def test_bare_tools_and_calls_without_ids_as_llama_factory_writes_them():
    """Its demos of glaive's tool calls, on a template that wants wrapped tools and ids of nine."""
    template = chat(
        "{% for t in tools or [] %}{{ t.function.name + (t.function.parameters | tojson) }}{% endfor %}" + HIDES
    )
    shared = [
        {"from": "human", "value": "Q?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "A."},
    ]
    found = out(shared, template, tools=json.dumps([FUNCTION]))
    assert (found["drop_reason"], found["remarks"]) == ("", [])
    assert supervised(found, template) == 'f{"x": 1}<|im_end|>A.<|im_end|>'
    assert template.tokenizer.decode(found["chosen_ids"]).startswith('f{"type": "object"')


def test_templates_without_ids_write_the_same_with_and_without():
    for name in ("qwen2_5", "qwen3", "llama3_1"):
        template = chat(trl_template(name))
        without = out([U, calls(call("f", x=1)), tool("12"), A], template)
        for given in ("toolu01", "abcdefgh9"):
            found = out([U, calls(call("f", given, x=1)), tool("12", given), A], template)
            assert (
                found == without and not found["drop_reason"] and found["remarks"] == [UNSUPPLIED] * (name == "qwen3")
            )


def test_gemma_finds_the_call_of_an_output_by_its_id():
    """It writes each output under its function's name, and no id."""
    template = chat(trl_template("gemma4"))
    two = [U, calls(call("f", "c1", x=1), call("g", "c2", x=2)), tool("12", "c1"), tool("13", "c2"), A]
    bare = [U, calls(call("f", x=1), call("g", x=2)), tool("12"), tool("13"), A]
    given, found = out(two, template), out(bare, template)
    assert found == given and not found["remarks"]
    text = template.tokenizer.decode(found["chosen_ids"])
    assert text.index("response:f{") < text.index("response:g{")


# -------------------------------------------------------------------------------------- fields that nothing reads; loss


@pytest.mark.parametrize(("thoughts", "kind"), [(7, "a number"), (["Hm."], "a list"), ({"text": "Hm."}, "an object")])
def test_thoughts_that_are_no_text_drop_the_pair(thoughts, kind):
    """Else the turn would be learned without them. A switch of that name says nothing."""
    for name in ("reasoning_content", "thinking"):
        drops(name, kind, of=[U, {**A, name: thoughts}])
        normalize_messages([U, {**A, name: True}])


def test_fields_that_nothing_reads_are_named():
    spoken = {**A, "reasoning_content": "Hm.", "cost": 0.1, "empty": [], "turn_idx": 1, "id": ""}
    chosen = [{**U, "name": "Ann", "timestamp": "now"}, calls(call("f", "c1", x=1)), tool("12", "c1", name="f"), spoken]
    unread = lambda name, side: out(side, chat(trl_template(name)), [side[0], B])["unread"]  # noqa: E731
    assert unread("qwen2_5", chosen) == ["name", "timestamp", "reasoning_content", "cost", "turn_idx"]
    # Qwen3 reads reasoning; it mentions `name`, a tool's, and not a user's.
    assert unread("qwen3", chosen) == ["name", "timestamp", "cost", "turn_idx"]
    asked = [U, {**A, "reasoning_content": "Hm."}, U]  # of the prompt's turns thoughts are shown behind no question
    assert unread("qwen3", [U, {**A, "reasoning_content": "Hm."}, U, A]) == []
    row = {"prompt": asked, "chosen": [A], "rejected": [B]}
    assert tokenize_row(row, 0, chat(trl_template("qwen3")), SETTINGS)["unread"] == ["reasoning_content"]
    named = CHATML.replace("m['content']", "(m.name or '') + m['content']")
    assert out([chosen[0], A], chat(named), [chosen[0], B])["unread"] == ["timestamp"]
    asked = {"prompt": [{**U, "cost": 1}], "chosen": [A], "rejected": [{**B, "rank": 2}]}
    assert row_to_pair(asked).unread == ["cost", "rank"]
    dropped_row = out([{**U, "cost": 1}, A], chat(CHATML), [{**U, "cost": 1}, A])
    assert (dropped_row["drop_reason"], dropped_row["unread"]) == ("chosen equals rejected", ["cost"])


@pytest.mark.parametrize(
    ("fields", "weight"),
    [({"loss": False}, 0), ({"loss": True}, 1), ({"loss": None}, 1), ({"loss": 0}, 0), ({"loss": 1}, 1),
     ({"loss": 0.5}, 0.5), ({"loss": "False"}, 0), ({"loss": "true"}, 1), ({"train": False}, 0),
     ({"training": False}, 0), ({"trainable": False}, 0), ({"weight": 0, "loss": False}, 0),
     ({"weight": 0.5, "train": True}, 0.5),
     ({"loss": "maybe"}, ("loss", '"maybe"')),
     ({"loss": [1]}, ("loss", "[1]")),
     ({"weight": 2, "loss": False}, ("weight and loss",)),
     ({"loss": True, "train": False}, ("loss and train",))],
    ids=str,
)  # fmt: skip
def test_what_says_that_a_turn_is_not_learned(fields, weight):
    messages = [{**U, "loss": False}, {**A, **fields}, U, {**B, "loss": True}]
    if isinstance(weight, tuple):
        return drops(*weight, "message 2: ", of=messages)
    found = read_messages(messages)
    assert (found.messages, found.unread) == ([U, A, U, B], {})
    assert found.weights == ([1, weight, 1, 1] if weight != 1 else [])


def test_a_turn_that_is_not_learned_is_context():
    template = chat(CHATML)
    row = {"chosen": [U, {**A, "loss": False}, U, B], "rejected": [U, {**B, "train": False}, U, A]}
    found = tokenize_row(row, 0, template, SETTINGS)
    assert [supervised(found, template, side) for side in ("chosen", "rejected")] == ["B.<|im_end|>", "A.<|im_end|>"]
    assert found["chosen_weights"] == found["rejected_weights"] == []
    row["chosen"][3] = {**B, "loss": False}
    assert tokenize_row(row, 0, template, SETTINGS)["drop_reason"] == "every turn of a side has weight 0"


def test_agent_instruct():
    """Its first answer is an acknowledgment that is not to be learned; users have `loss: null`."""
    human = [{"from": "human", "value": text, "loss": None} for text in ("Rules.", "Go north?")]
    yes = {"from": "gpt", "value": "I shall follow them.", "loss": False}
    row = {side: [yes, human[1], {"from": "gpt", "value": f"Going {where}.", "loss": True}]
           for side, where in (("chosen", "north"), ("rejected", "south"))}  # fmt: skip
    template = chat(CHATML)
    found = tokenize_row({"conversations": human[:1], **row}, 0, template, SETTINGS)
    assert (found["drop_reason"], found["unread"]) == ("", [])
    assert supervised(found, template) == "Going north.<|im_end|>"
    assert supervised(found, template, "rejected") == "Going south.<|im_end|>"


def test_a_prompt_may_say_what_it_is_not_learned_anyway():
    for fields in ({"loss": False}, {"loss": True}, {"weight": 0}, {"weight": 1}):
        row = {"prompt": [U, {**A, **fields}, U], "chosen": [B], "rejected": [A]}
        assert row_to_pair(row) == row_to_pair({**row, "prompt": [U, A, U]}) or fields in (
            {"loss": False},
            {"weight": 0},
        )
        template = chat(CHATML)
        assert supervised(tokenize_row(row, 0, template, SETTINGS), template) == "B.<|im_end|>"
    assert list(read_messages([{**U, "loss": True}]).unread) == ["loss of user messages"]


# ------------------------------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    ("message", "key", "detail"),
    [
        ({"role": "robot", "content": "x"}, "unknown role", ": robot"),
        ({"content": "x", "id": 1}, "unknown role", ": None (message has keys: content, id)"),
        ("x", "a text in place of a message", ""),
        (
            {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]},
            "content part",
            "{type: image_url}",
        ),
        ({"role": "assistant", "content": [{"type": "text"}]}, "content part", "{type: text} without text"),
        ({"role": "assistant", "content": {"answer": 42}}, "content", "an object"),
        ({"role": "assistant", "content": ""}, "an empty assistant turn", ""),
        ({"role": "assistant", "content": "", "reasoning_content": "Hm."}, "an assistant turn of thoughts alone", ""),
        ({"role": "assistant", "content": "<think>\nHm.\n</think>\n"}, "an assistant turn of thoughts alone", ""),
        ({"role": "assistant", "content": "Let me see.\n</think>"}, "an assistant turn of thoughts alone", ""),
        ({"role": "tool", "output": "12"}, "empty or missing content", "(message has keys: output)"),
        ({"role": "user", "content": "x", "tool_calls": [call()]}, "tool calls in a user message", ""),
        (calls(call(x="\ud83d")), "tool calls", "not text"),
        ({"role": "assistant", "content": "\ud83d"}, "content", "not text"),
    ],
)
def test_reasons_name_the_message(message, key, detail):
    drops(key, "message 2: ", of=[U, message])
    for name in ("chosen", "rejected", "prompt"):
        row = {"prompt": [U], "chosen": [A], "rejected": [B]}
        row[name] = [*(row[name] if name == "prompt" else []), message]
        with dropped(key, f"{name}, message {len(row[name])}: ", detail):
            row_to_pair(row)


def test_reasons_hold_no_long_values():
    long = "x" * 1000
    # fmt: off
    for message in ({"role": long, "content": "x"}, {long: 1}, {"type": long},
                    {"role": "user", "content": [{"type": long}]},
                    {"role": "assistant", "content": "x", "loss": long}, {"role": "user", "content": [{long: 1}]}):
        # fmt: on
        with pytest.raises(DropPair) as caught:
            normalize_messages([message])
        assert len(str(caught.value)) < 150


USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "12"}]}
WHOLE = [
    [U, {"role": "assistant", "content": [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "L"}, USE]},
     {"role": "user", "content": [RESULT, {"type": "text", "text": "Go."}]}, A],
    [U, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "T"}]},
     {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
     {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "12"}]}, A],
    [{"lc": 1, "id": ["HumanMessage"], "kwargs": {"content": "Q"}},
     {"type": "ai", "data": {"content": "A", "tool_calls": [{"name": "f", "args": {}, "id": "c"}],
                             "additional_kwargs": {"tool_calls": []}}}],
    [{"role": "user", "parts": [{"text": "Q"}]},
     {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]},
     {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"a": 1}}},
                                {"toolResult": {"toolUseId": "c", "content": [{"json": {}}]}}]},
     {"role": "model", "parts": [{"text": "B"}]}],
    [U, {"role": "assistant", "content": "A", "loss": False, "refusal": "r"},
     {"from": "tool_call", "value": {"name": "f"}}],
]  # fmt: skip
STRANGE = [None, "", "x", 5, 10**400, float("nan"), True, [], {}, ["x"], {"x": 1}, [[]], [{}], [None], "{", "[[1]]",
           "\ud83d", [{"role": "user"}], {"role": "assistant", "content": "x"}, "9" * 5000, "[" * 5000,
           b"x"]  # fmt: skip


def places(value, path=()):
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def put(value, path, other):
    if not path:
        return other
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], other)
    return value


@pytest.mark.parametrize("whole", WHOLE, ids=["anthropic", "responses", "langchain", "gemini", "others"])
def test_no_odd_value_is_an_error_of_ours(whole):
    """Each place of a conversation in turn holds each odd value: it is read, or dropped under a short name."""
    kept, reasons = 0, set()
    for path in list(places(whole))[1:]:
        for value in STRANGE:
            try:
                found = normalize_messages(put(whole, path, value))
                kept += all(m["role"] and isinstance(m["content"], str) for m in found)
            except DropPair as reason:
                reasons.add(str(reason))
    assert kept > 40 and len(reasons) > 20 and max(map(len, reasons)) < 150


# ---------------------------------------------------------------------------------------------- an oracle for all forms


def test_supervised_text_is_the_answers_own():
    """Whatever the form: under Qwen 2.5's template the supervised text is the answers' words and calls."""
    template = chat(trl_template("qwen2_5"))
    written = '{"name": "f", "arguments": {"x": 1}}'
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "12"}
    forms = {
        "openai": THREE,
        "anthropic": [U, {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, use]},
                      {"role": "user", "content": [result]}, A],
        "responses": [U, {"role": "assistant", "content": "Let me look."},
                      {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
                      {"type": "function_call_output", "call_id": "c1", "output": "12"}, A],
        "swift": [U, {"role": "assistant", "content": "Let me look."}, {"role": "tool_call", "content": written},
                  {"role": "tool_response", "content": "12"}, A],
        "json": json.dumps(THREE),
    }  # fmt: skip
    ids = set()
    for name, chosen in forms.items():
        found = tokenize_row({"chosen": chosen, "rejected": [U, B], "tools": [FUNCTION]}, 0, template, SETTINGS)
        assert found["drop_reason"] == "" and found["unread"] == []
        assert found["remarks"] == [FROM_JSON] * (name == "json")
        said = f"Let me look.\n<tool_call>\n{written}\n</tool_call><|im_end|>A.<|im_end|>"
        assert supervised(found, template) == said
        ids.add(tuple(found["chosen_ids"]))
    assert len(ids) == 1


def test_ids_of_calls_are_no_words_of_a_prompt():
    asked, again = ([U, calls(call("f", i, x=1)), tool("T", i)] for i in ("c1", "c2"))
    pair = row_to_pair({"prompt": asked, "chosen": [*again, A], "rejected": [B]})
    assert pair.chosen == [*asked, A] and pair.n_prompt == 3
    other = [U, calls(call("f", "c1", x=2)), tool("T", "c1")]
    with dropped("prompt mismatch"):
        row_to_pair({"prompt": asked, "chosen": [*other, A], "rejected": [B]})


def test_messages_as_json_behind_a_byte_order_mark():
    assert conversation("\ufeff" + json.dumps([U, A]) + "\n") == [U, A]
    assert conversation("\ufeffAn answer") == "\ufeffAn answer"


@pytest.mark.parametrize("role", ["user", "function", "tool"])
def test_gemini_outputs_under_any_role(role):
    part = {"functionResponse": {"name": "f", "response": {"r": "T"}}}
    [read] = normalize_messages([{"role": role, "parts": [part]}])
    assert (read["role"], read["content"]) == ("tool", '{"r": "T"}')


@pytest.mark.parametrize(("template", "field"), [("qwen3", "reasoning"), ("gptoss", "reasoning_content")])
def test_thoughts_that_the_template_shows_under_another_name_are_used(template, field):
    row = {"chosen": [U, {**A, field: "Hm."}], "rejected": [U, B]}
    assert tokenize_row(row, 0, chat(trl_template(template)), SETTINGS)["unread"] == []
    assert tokenize_row(row, 0, chat(CHATML), SETTINGS)["unread"] == [field]


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
def test_thoughts_that_only_their_own_turn_s_sequence_has_are_used(template):
    """The text of the whole is without them."""
    row = {"chosen": [U, {**A, "thinking": "Hm."}, U, A], "rejected": [U, {**A, "thinking": "Hm."}, U, B]}
    assert tokenize_row(row, 0, chat(trl_template(template)), SETTINGS)["unread"] == []


@pytest.mark.parametrize("nothing", ["null", "", "[]", [], None])
def test_no_calls(nothing):
    assert normalize_messages([U, {**A, "tool_calls": nothing}])[1] == A


def test_an_end_of_turn_token_in_an_answer_is_counted():
    def remarks(text):
        return tokenize_row({"chosen": [U, {**A, "content": text}], "rejected": [U, B]}, 0, chat(CHATML), SETTINGS)[
            "remarks"
        ]

    assert remarks("A.<|im_end|>") == remarks("A.<|im_end|>\n<|im_start|>user\nQ?") == [ENDS]
    assert remarks("A.") == remarks("im_end") == []
