"""mdpo/rollouts/calls.py: what a turn calls, in each of the three forms."""

import pytest
from errors import refused
from repository import ROOT
from tiny import CHATML, TRL_TEMPLATES, tokenizer_for

from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.calls import Call, PythonBlocks, TaggedCalls, TemplateCalls, call_form
from mdpo.rollouts.response_forms import with_response_form
from mdpo.rollouts.rewards import final_answer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
USER = [{"role": "user", "content": "Weather in Paris?"}]
# A template of TRL's: what its policy writes to call get_weather(city="Paris", days=2), and the end of its turn.
WRITTEN = {
    "qwen2_5": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
                "<|im_end|>"),
    "qwen3": ('<think>\nA call.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": '
              '{"city": "Paris", "days": 2}}\n</tool_call>', "<|im_end|>"),
    "llama3_1": ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', "<|eot_id|>"),
    "qwen3_5_nothink": ("<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n"
                        "2\n</parameter>\n</function>\n</tool_call>", "<|im_end|>"),
    "glm4moe": ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days"
                "</arg_key>\n<arg_value>2</arg_value>\n</tool_call>", "<|user|>"),
}  # fmt: skip


def template_of(name: str, eos: str) -> ChatTemplate:
    source = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer_for(source, "byte", eos=eos))


def read(form, template: ChatTemplate, text: str, stop: str = ""):
    prompt = template.tokenizer(template.render(USER, form.schemas, generation=True)).input_ids
    ids = template.tokenizer(text + stop, add_special_tokens=False).input_ids
    return form.read(text, ids, prompt)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_templates_own_calls_are_read(name):
    text, stop = WRITTEN[name]
    template = template_of(name, stop)
    form = call_form("auto", [WEATHER], template, "user")
    assert isinstance(form, TemplateCalls)
    turn = read(form, template, text, stop)
    assert turn.calls == [Call("get_weather", {"city": "Paris", "days": 2})] and not turn.malformed
    assert turn.message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": turn.calls[0].arguments}
    assert form.results(turn, ["sunny"]) == [{"role": "tool", "name": "get_weather", "content": "sunny"}]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_a_broken_call_is_text_and_is_answered(name):
    template = template_of(name, "<|im_end|>")
    form = call_form("template", [WEATHER], template, "user")
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>'
    turn = read(form, template, text, "<|im_end|>")
    assert not turn.calls and turn.malformed and turn.message == {"role": "assistant", "content": text}
    assert form.results(turn, ["error: …"]) == [{"role": "tool", "content": "error: …"}]


def test_a_turn_without_a_call_calls_nothing():
    template = template_of("qwen2_5", "<|im_end|>")
    turn = read(call_form("auto", [WEATHER], template, "user"), template, "It is sunny.", "<|im_end|>")
    assert turn.message == {"role": "assistant", "content": "It is sunny."} and not turn.calls and not turn.malformed


def test_a_template_without_tools_gets_them_as_text(capsys):
    template = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    form = call_form("auto", [WEATHER], template, "user")
    assert isinstance(form, TaggedCalls) and form.schemas is None
    opened = form.opening(USER)
    assert [m["role"] for m in opened] == ["system", "user"] and '"name": "get_weather"' in opened[0]["content"]
    own = form.opening([{"role": "system", "content": "Be brief."}, *USER])
    assert own[0]["content"].startswith("Be brief.\n\n") and own[0]["content"].endswith(opened[0]["content"])
    assert "does not show tools" in capsys.readouterr().out
    with refused("tool_calls"):
        call_form("template", [WEATHER], template, "user")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_that_trl_does_not_know_is_read_in_the_form_that_it_writes(name):
    """TRL knows templates word by word; one with a comment behind it writes the same."""
    text, stop = WRITTEN[name]
    source = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    known, other = (ChatTemplate(tokenizer_for(s, "byte", eos=stop)) for s in (source, source + "{# ours #}"))
    assert with_response_form(other).response_template == with_response_form(known).response_template
    form = call_form("template", [WEATHER], other, "user")
    assert read(form, other, text, stop).calls == [Call("get_weather", {"city": "Paris", "days": 2})]


@pytest.mark.parametrize("ours", ["with", "<call>"])
def test_calls_that_no_form_reads_are_written_as_text(ours, capsys):
    """What is shown is no JSON of a call, or between other tags."""
    source = (ROOT / "recipes/smollm2-135m/data/tools.jinja").read_text(encoding="utf-8")
    theirs = {"with": '"arguments": ', "<call>": "<tool_call>\\n"}[ours]
    changed = source.replace(theirs, {"with": '"with": ', "<call>": "<call>\\n"}[ours])
    assert changed != source
    template = ChatTemplate(tokenizer_for(changed, "byte", eos="<|im_end|>"))
    assert isinstance(call_form("auto", [WEATHER], template, "user"), TaggedCalls)
    assert "neither the tokenizer nor" in capsys.readouterr().out
    with refused("tool_calls", "response_template"):
        call_form("template", [WEATHER], template, "user")


TEXT = {
    "one": ('Let me look.\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', [Call("a", {"x": 1})], False),
    "two": ('<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"name": "b"}</tool_call>',
            [Call("a", {}), Call("b", {})], False),
    "the end left out": ('<tool_call>{"name": "a", "arguments": {}}', [Call("a", {})], False),
    "none": ("No <call> at all.", [], False),
    "no JSON": ("<tool_call>a(1)</tool_call>", [], True),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', [], True),
    "a list of arguments": ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', [], True),
    "one of two broken": ('<tool_call>{"name": "a"}</tool_call><tool_call>{</tool_call>', [], True),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT)
def test_calls_as_text(name):
    template = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    text, calls, malformed = TEXT[name]
    form = call_form("text", [WEATHER], template, "tool")
    turn = form.read(text, [], [])
    assert turn.message == {"role": "assistant", "content": text}
    assert turn.calls == calls and bool(turn.malformed) == malformed
    assert form.results(turn, ["1", "2"]) == [
        {"role": "tool", "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"}
    ]


def test_thoughts_call_nothing():
    """A policy that thinks of a call, of code or of a box has not written it yet."""
    template = template_of("qwen3", "<|im_end|>")
    form = call_form("auto", [WEATHER], template, "user")
    turn = read(form, template, "<think>\nA <tool_call> would do.\n</think>\n\nIt is sunny.", "<|im_end|>")
    assert not turn.calls and not turn.malformed and turn.message["content"] == "It is sunny."
    thoughts = '<think>\n```python\nprint(0)\n```\n\\boxed{5} <tool_call>{"name": "a"}</tool_call>\n</think>\n'
    assert PythonBlocks().read(f"{thoughts}```python\nprint(1)\n```", [], []).calls == [
        Call("python", {"code": "print(1)\n"})
    ]
    assert not PythonBlocks().read(thoughts, [], []).calls
    assert not TaggedCalls([WEATHER], template).read(thoughts, [], []).calls
    assert final_answer([{"role": "assistant", "content": thoughts}]) is None
    assert final_answer([{"role": "assistant", "content": f"{thoughts} \\boxed{{7}}"}]) == "7"


PYTHON = {
    "a box that is spoken of": ("In \\boxed{} then.\n```python\nprint(1)\n```", "print(1)\n"),
    "one block": ("```python\nprint(1)\n```", "print(1)\n"),
    "two blocks are one program": ("```python\nx = 1\n```\nand\n```python\nprint(x)\n```", "x = 1\n\nprint(x)\n"),
    "an open block": ("```python\nprint(1)", "print(1)"),
    "other code": ("```\nprint(1)\n```", None),
    "a box beside code is the answer": ("```python\nprint(1)\n```\n\\boxed{1}", None),
    "a box inside code is none": ("```python\nprint('\\boxed{1}')\n```", "print('\\boxed{1}')\n"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_blocks(name):
    text, code = PYTHON[name]
    turn = PythonBlocks().read(text, [], [])
    assert turn.message == {"role": "assistant", "content": text}
    assert turn.calls == ([] if code is None else [Call("python", {"code": code})])


def test_an_output_block_ends_with_a_line_break():
    results = PythonBlocks("tool").results(PythonBlocks().read("", [], []), ["1", "2\n", ""])
    assert results == [{"role": "tool", "content": f"```output\n{text}```"} for text in ("1\n", "2\n", "")]
