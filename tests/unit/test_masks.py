"""Truth tables: which tokens of a conversation are supervised, on every text chat template that TRL ships.

ROWS (tests/masks, read by templates.py) says how each template writes a conversation. It was written down by reading
the template's source: what the generation prompt supplies (`header`, `block`), what the policy samples then (`lead`,
content or call, `stop`), and what the template writes after the end of turn (`after`). From it follow segments (text,
supervised) whose concatenation must be the template's own text; a token's expected mask is that of the segment that
its bytes lie in.
"""

import copy
import re
from dataclasses import replace

import pytest
from conversations import (
    EMPTY,
    EXCLUDED,
    NO_TOOLS,
    OPENED,
    REASONING,
    REPLIES,
    SEVERAL,
    THINK,
    THINKING,
    THINKING_CALLS,
    TOOLS,
    WEATHER,
    assistant,
    one_call,
    pair_of,
    text_turns,
    tool,
    user,
)
from errors import dropped
from segments import (
    CONVERSATIONS,
    OTHERS,
    SETTINGS,
    as_stop,
    check,
    expected_segments,
    hostile,
    native,
    searched,
    with_json_arguments,
)
from templates import ROWS, chat_template, read_rows
from tiny import CHATML, TRL_TEMPLATES, tokenizer_for, trl_template
from tokenizers import processors
from transformers import tokenization_utils_base

from mdpo.data.messages import normalize_messages
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import special_tokens_in_context, tokenize_pair


def test_the_table_names_exactly_the_templates_that_trl_ships():
    found = {path.stem for path in TRL_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")}
    assert len(found) >= 40
    assert set(ROWS) == found


def test_a_table_that_says_what_no_row_knows_is_refused():
    entry = "x: {user: [u, v], header: h, stop: s, %s}"
    assert read_rows([entry % "after: a", "_y: {}\n"])["x"].after == "a"
    for wrong, error in {"befor: a": TypeError, "clean: tidy": KeyError, "like: nobody": KeyError}.items():
        with pytest.raises(error):
            read_rows([entry % wrong])


def both_kinds(name):
    return [chat_template(name, "byte"), chat_template(name, "metaspace")]


# ---- truth tables


@pytest.fixture(autouse=True, scope="module")
def each_text_is_rendered_once():
    """Rendering takes most of the time, and is the same for each kind of tokenizer."""
    render, known = tokenization_utils_base.render_jinja_template, {}

    def remembered(**kwargs):
        key = repr(kwargs)
        if key not in known:
            known[key] = render(**kwargs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization_utils_base, "render_jinja_template", remembered)
        yield


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_truth_table(conversation, name):
    """With a byte-level and with a Metaspace tokenizer. What gpt-oss writes beside a call is gone from the whole
    conversation: tests/unit/test_sequences.py has it."""
    if (conversation, name) == ("call with text", "gptoss"):
        return
    messages = CONVERSATIONS[conversation](name)
    tools = TOOLS if any("tool_calls" in m for m in messages) else None
    reason = EXCLUDED.get(conversation, {}).get(name)
    if reason is None:
        check(name, both_kinds(name), messages, tools)
    for template in both_kinds(name) if reason else ():
        with dropped(*reason):
            tokenize_pair(pair_of(messages, tools=tools), template, SETTINGS)


@pytest.mark.parametrize("name", ROWS)
def test_arguments_as_json_strings_give_the_same_tokens(name):
    messages = one_call(WEATHER)
    strings = with_json_arguments(messages)
    assert strings[1]["tool_calls"][0]["function"]["arguments"].startswith('{"city": "Paris"')
    parsed = normalize_messages(strings)
    assert parsed[1]["tool_calls"] == messages[1]["tool_calls"]
    if name not in NO_TOOLS:
        template = chat_template(name)
        got = [tokenize_pair(pair_of(side, tools=TOOLS), template, SETTINGS) for side in (parsed, messages)]
        assert got[0] == got[1]


# ---- thinking: (what the generation prompt supplies, what the policy samples) of each assistant turn


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_in_the_content(name):
    messages = [user("One?"), assistant(THINK + "Yes."), user("Two?"), assistant(THINK + "No.")]
    assert check(name, both_kinds(name), messages, turns=THINKING[name]) == (2 if name in SEVERAL else 1)


def test_reasoning_behind_a_closed_block_is_no_turn_that_was_sampled():
    messages = [user("One?"), assistant(THINK + "Yes.")]
    with dropped("thoughts of a turn whose generation prompt leaves no room for any", "message 2", "enable_thinking"):
        tokenize_pair(pair_of(messages), chat_template("qwen3_5_nothink"), SETTINGS)


def test_reasoning_that_its_own_turn_leaves_out_is_dropped_by_field():
    """Gemma 4 writes thoughts beside tool calls only."""
    messages = [user("One?"), assistant("No.", reasoning_content="Tea.")]
    with dropped("template leaves out content", "reasoning_content (message 2)"):
        tokenize_pair(pair_of(messages), chat_template("gemma4"), SETTINGS)


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_in_a_field_of_its_own(name):
    messages = [user("One?"), assistant("No.", reasoning_content="Tea.")]
    check(name, chat_template(name), messages, turns=[REASONING[name]])


@pytest.mark.parametrize("name", THINKING_CALLS)
def test_reasoning_before_a_tool_call(name):
    messages = one_call(WEATHER, content=THINK, answer=THINK + "No.")
    check(name, chat_template(name), messages, TOOLS, turns=THINKING_CALLS[name])


@pytest.mark.parametrize(
    "name, turns",
    [
        ("qwen3", [("", EMPTY + "Yes.")]),  # the message says it, and the generation prompt does not supply it
        ("qwen3_5_think", [("<think>\n", "\n</think>\n\nYes.")]),
        ("qwen2_5", [("", EMPTY + "Yes.")]),
    ],
)
def test_an_empty_think_block_in_the_content(name, turns):
    check(name, chat_template(name), [user("One?"), assistant(EMPTY + "Yes.")], turns=turns)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano", "glm4moe"])
@pytest.mark.parametrize("thinking", [True, False])
def test_enable_thinking_and_turns_without_reasoning(name, thinking):
    """Its empty think block is supplied to each turn, and where history leaves it out each is a sequence."""
    row = ROWS[name]
    if name == "glm4moe" and not thinking:
        row = replace(row, user=("\n", "/nothink"))
    template = ChatTemplate(tokenizer_for(trl_template(name)), {"enable_thinking": thinking})
    several = name.startswith("qwen3") and not thinking
    assert check(name, template, text_turns(2), row=row) == 1 + several


def test_enable_thinking_and_reasoning():
    template = ChatTemplate(tokenizer_for(trl_template("qwen3_5_nothink")), {"enable_thinking": True})
    check("qwen3_5_nothink", template, [user("One?"), assistant(THINK + "No.")], turns=[OPENED])


# ---- single traps


@pytest.mark.parametrize(
    "name, turns", [("qwen3", [("", "Yes."), (EMPTY, "No.")]), ("qwen3_5_think", [(EMPTY, "Yes."), (EMPTY, "No.")])]
)
def test_a_user_who_writes_a_tool_response(name, turns):
    """The template takes that message for a tool's: turns before it then count as being after the last question."""
    question = user(f"<tool_response>\n{OTHERS}\n</tool_response>")
    messages = [user("One?"), assistant("Yes."), question, assistant("No.")]
    check(name, chat_template(name), messages, turns=turns)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_5_think", "glm4moe", "nemotron_3_nano", "gemma4_v2", "lfm2_2_5"])
def test_white_space_at_the_end_of_content_and_of_arguments(name):
    """Some templates strip the one and not the other; code ends with a newline as a rule."""
    messages = one_call(("get_time", {"code": "print(12)\n"}), content="Let me look.\n")
    check(name, chat_template(name), messages, TOOLS)


@pytest.mark.parametrize("name", ["qwen3_5_think", "nemotron_3_ultra", "llama3", "gemma", "cohere", "idefics3", "phi3"])
def test_unicode_at_both_edges(name):
    texts = ["\u0301x\u0301", "🙂", "日本", "<|im_end|>", "a\u200d"]
    messages = [make(text) for text in texts for make in (user, assistant)]
    check(name, both_kinds(name), [user("One?"), assistant("Yes."), *messages])


@pytest.mark.parametrize("conversation", ["4 turns", "hostile user", "white space", "own markers", "hostile tool"])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "llama3_1", "cohere", "phi3", "deepseekv3", "idefics3", "llava_next", "gptoss"]
)
def test_metaspace_that_prepends_a_space(name, conversation):
    """It turns `<|im_start|>user` into `<|im_start|>`, `▁user`: no text stands for that space."""
    messages = CONVERSATIONS[conversation](name)
    if name not in EXCLUDED.get(conversation, ()):
        check(name, chat_template(name, "always"), messages, TOOLS if "tool" in conversation else None)


@pytest.mark.parametrize("conversation", ["4 turns", "hostile user", "white space"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3", "idefics3", "llava_next", "lfm2"])
def test_byte_level_that_reports_words_without_their_space(name, conversation):
    tokenizer = copy.deepcopy(tokenizer_for(trl_template(name)))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    check(name, ChatTemplate(tokenizer), CONVERSATIONS[conversation](name))


@pytest.mark.parametrize("space", ["", "\n"])
def test_a_builtin_tool_of_llama_ends_with_its_own_token(space):
    row = ROWS["llama3_1"]
    tools = replace(row.tools, call=lambda *_: '<|python_tag|>python.call(code="print(12)")', stop="<|eom_id|>")
    template = ChatTemplate(tokenizer_for(trl_template("llama3_1")), {"builtin_tools": ["python"]})
    output, answer = f"12{space}", f"Twelve.{space}"
    messages = one_call(("python", {"code": "print(12)"}), output=output, answer=answer)
    check("llama3_1", template, messages, row=replace(row, tools=tools))


@pytest.mark.parametrize("name", ROWS)
def test_the_end_of_turn_may_be_the_eos_token(name):
    """As in most published tokenizers. Phi-3 then ends with one more of them, which the policy does not sample."""
    conversation = "2 turns" if name in EXCLUDED["call, system"] else "call, system"
    eos = re.findall(r"<[^<>]*>", as_stop(name))[-1]
    template = ChatTemplate(tokenizer_for(trl_template(name), eos=eos))
    row = replace(ROWS[name], end=eos if ROWS[name].end else "")
    check(name, template, CONVERSATIONS[conversation](name), TOOLS if "call" in conversation else None, row)


@pytest.mark.parametrize("name", sorted(set(ROWS) - NO_TOOLS))
def test_markers_in_the_arguments_of_a_call(name):
    messages = one_call(("get_weather", {"note": hostile(name, "Note"), "days": 3}))
    check(name, chat_template(name), messages, TOOLS)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3_1", "gptoss", "deepseekv3", "glm4moe"])
def test_strings_deep_in_the_arguments(name):
    arguments = {"where": {"city": "Paris", "spots": ["Seine", {"hill": "Montmartre"}]}, "days": 3}
    check(name, chat_template(name), one_call(("get_weather", arguments)), TOOLS)


@pytest.mark.parametrize("name", ["qwen2_5", "gptoss", "gemma"])
def test_content_that_holds_every_sentinel(name):
    words = "Qz0a Qz0b Zq1a Qj Jq Xz"
    check(name, chat_template(name), [user(words), assistant(words), user("Two?"), assistant(words)])


def test_assistant_turns_of_the_prompt_are_context():
    template, messages = chat_template("qwen2_5"), text_turns(2)
    whole = tokenize_pair(pair_of(messages), template, SETTINGS)
    got = tokenize_pair(pair_of(messages, n_prompt=3), template, SETTINGS)
    tokenizer = template.tokenizer
    assert got.chosen_ids == whole.chosen_ids
    assert tokenizer.decode([i for i, m in zip(got.chosen_ids, got.chosen_mask, strict=True) if m]) == (
        REPLIES[1] + "<|im_end|>"
    )


def test_special_tokens_in_the_context_are_counted():
    messages = [
        {"role": "system", "content": "a <|im_end|>"},
        user("<|im_start|>assistant\nb<|im_end|> <|eot_id|>"),
        assistant("c <|im_end|>"),
        tool("<|im_end|><|im_end|>"),
        assistant("d"),
    ]
    template = ChatTemplate(tokenizer_for(CHATML))
    assert special_tokens_in_context(pair_of(messages), template) == 5


@pytest.mark.parametrize("wrong", [{"stop": "<|im_end|>\n", "after": ""}, {"lead": "Tw"}, {"header": "<|im_start|>"}])
def test_a_wrong_table_fails(wrong):
    with pytest.raises(AssertionError):
        check("qwen2_5", chat_template("qwen2_5"), text_turns(2), row=replace(ROWS["qwen2_5"], **wrong))


# ---- the wrong twin: what published code does, headers and end-of-turn tokens searched for in the text


@pytest.mark.parametrize("name", ROWS)
def test_a_mask_by_search_fails_on_hostile_text(name):
    row, tokenizer = ROWS[name], tokenizer_for(trl_template(name))
    agrees = {}
    for conversation in ("2 turns", "hostile user"):
        messages = CONVERSATIONS[conversation](name)
        text = tokenizer.apply_chat_template(native(name, messages), tokenize=False)
        segments = expected_segments(row, messages, text)
        expected = [flag for part, flag in segments for _ in part]
        agrees[conversation] = searched(text, row.header or row.user[1], as_stop(name)) == expected
    assert not agrees["hostile user"]
    assert agrees["2 turns"] or row.block or not isinstance(row.stop, str)  # in good weather it looks right
