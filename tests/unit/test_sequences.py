"""Sequences by hand: what a model was given and what it sampled at each turn, written down from the template's source.

A sequence is written as its text, what is supervised between « and ». All expected texts follow from two facts, the
generation prompt and what the template makes of a turn once others follow. What stands before the first question (the
system text of a template, tools) is compared with the template's own prompt.
"""

import copy
import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
from conversations import SYSTEM, THINK, TOOLS, assistant, pair_of, tool, user
from errors import dropped
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_checks import LETTERS, byte_level, rounds
from segments import CONVERSATIONS, hostile
from shown import sequences_of, shown_side
from templates import ROWS, chat_template
from tiny import CHATML, tokenizer_for, trl_template
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from mdpo.errors import DropPair
from mdpo.masking import spans
from mdpo.masking.breaks import EARLIER_THOUGHTS, OTHER_STOP, RETOKENIZED, SYSTEM_MOVED, THINK_BLOCK, WHITE_SPACE
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.masking.sequences import NO_REASONING, by_turns, in_one_text, side_sequences
from mdpo.masking.spans import PromptTokens, token_ids, tokenize
from mdpo.masking.stops import EMPTY_THINK
from mdpo.types import Pair, common_prefix, turn_begins

SETTINGS = RenderSettings(None)
RAIN, NOON = ("get_weather", {"city": "Lyon"}), ("get_time", {"zone": "UTC"})


def check(template, messages, expected, why=(), head="", **more):
    """The chosen side's sequences are those expected, each behind the template's own text up to `head`, and each turn
    is supervised once."""
    got = tokenize_pair(pair_of(messages, **more), template, SETTINGS)
    prompt = template.render(messages[:1], more.get("tools"), generation=True)
    preamble = prompt[: prompt.index(head)] if head else ""
    assert shown_side(template.tokenizer, got) == [preamble + text for text in expected]
    assert got.chosen_breaks == list(why)
    turns = sum(m["role"] == "assistant" for m in messages)
    assert sum(int(turn_begins(mask).sum()) for _, mask in sequences_of(got)) == turns
    return got


# ---- Qwen3: thoughts stay as long as no other question follows. Asked `<|im_start|>assistant\n`, it samples its think
# block, the answer and <|im_end|>; a line break follows that in history.

ASK = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
WET = "\n<|im_start|>user\n<tool_response>\nwet\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def thought(text):
    return f"<think>\n{text}\n</think>\n\n"


@pytest.mark.parametrize("in_content", [False, True])
def test_two_turns_with_thoughts(in_content):
    def turn(answer, own):
        return assistant(thought(own) + answer) if in_content else assistant(answer, reasoning_content=own)

    messages = [user("A?"), turn("Yes.", "T1"), user("B?"), turn("No.", "T2")]
    check(
        chat_template("qwen3"),
        messages,
        [f"{ASK}«{thought('T1')}Yes.<|im_end|>»", f"{ASK}Yes.{AGAIN}«{thought('T2')}No.<|im_end|>»"],
        [EARLIER_THOUGHTS],
    )


LOOP = [
    user("A?"),
    assistant("", RAIN, reasoning_content="T1"),
    tool("wet"),
    assistant("Yes.", reasoning_content="T2"),
    user("B?"),
    assistant("No.", reasoning_content="T3"),
]


def test_an_agent_s_loop_keeps_its_thoughts_until_the_next_question():
    """Two turns are one sequence, as a tool's output is no question; the third is one of its own."""
    check(
        chat_template("qwen3"),
        LOOP,
        [
            f"{ASK}«{thought('T1')}{CALL}<|im_end|>»{WET}«{thought('T2')}Yes.<|im_end|>»",
            f"{ASK}{CALL}<|im_end|>{WET}Yes.{AGAIN}«{thought('T3')}No.<|im_end|>»",
        ],
        [EARLIER_THOUGHTS],
        head=ASK,
        tools=TOOLS,
    )


def test_a_think_block_of_the_generation_prompt():
    """enable_thinking=False: an empty block is supplied to each turn, and is in no history."""
    template = ChatTemplate(tokenizer_for(trl_template("qwen3")), {"enable_thinking": False})
    block = "<think>\n\n</think>\n\n"
    check(
        template,
        rounds("A?", "Yes.", "B?", "No."),
        [f"{ASK}{block}«Yes.<|im_end|>»", f"{ASK}Yes.{AGAIN}{block}«No.<|im_end|>»"],
        [THINK_BLOCK],
    )


def test_a_block_where_history_goes_on_with_letters_of_its_tag():
    """A call begins with `<t` as the block does."""
    calls = [user("A?"), assistant("", RAIN), tool("wet"), assistant("Yes.")]
    template = ChatTemplate(tokenizer_for(trl_template("qwen3")), {"enable_thinking": False})
    block = "<think>\n\n</think>\n\n"
    expected = [f"{ASK}{block}«{CALL}<|im_end|>»", f"{ASK}{CALL}<|im_end|>{WET}{block}«Yes.<|im_end|>»"]
    check(template, calls, expected, [THINK_BLOCK], head=ASK, tools=TOOLS)


# ---- gpt-oss: <|start|>assistant is supplied, the channels are sampled. <|call|> ends a call and <|return|> an answer;
# an answer in history ends with <|end|>, and once there is one, thoughts beside earlier calls are gone.

G_ASK = "<|start|>user<|message|>A?<|end|><|start|>assistant"
G_AGAIN = "<|end|><|start|>user<|message|>B?<|end|><|start|>assistant"
G_RAIN = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Lyon"}<|call|>'
G_NOON = ' to=functions.get_time<|channel|>commentary json<|message|>{"zone": "UTC"}<|call|>'
G_WET = '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"wet"<|end|><|start|>assistant'
G_TWELVE = '<|start|>functions.get_time to=assistant<|channel|>commentary<|message|>"12"<|end|><|start|>assistant'
FINAL = "<|channel|>final<|message|>"
TWO_CALLS = [
    user("A?"),
    assistant("", RAIN, thinking="T1"),
    tool("wet"),
    assistant("", NOON, thinking="T2"),
    tool("12", "get_time"),
    assistant("Yes.", thinking="T3"),
]


def analysis(text):
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


G_LOOP = (
    f"{G_ASK}«{analysis('T1')}{G_RAIN}»{G_WET}«{analysis('T2')}{G_NOON}»{G_TWELVE}"
    f"«{analysis('T3')}{FINAL}Yes.<|return|>»"
)


def test_two_calls_and_an_answer_are_one_sequence_though_no_rendered_text_holds_it():
    template = chat_template("gptoss")
    check(template, TWO_CALLS, [G_LOOP], head=G_ASK, tools=TOOLS)
    assert "T1" not in template.render(TWO_CALLS, TOOLS)  # the wrong twin, the text of the whole


def test_another_question_behind_two_calls():
    check(
        chat_template("gptoss"),
        [*TWO_CALLS, user("B?"), assistant("No.", thinking="T4")],
        [G_LOOP, f"{G_ASK}{G_RAIN}{G_WET}{G_NOON}{G_TWELVE}{FINAL}Yes.{G_AGAIN}«{analysis('T4')}{FINAL}No.<|return|>»"],
        [EARLIER_THOUGHTS],
        head=G_ASK,
        tools=TOOLS,
    )


def test_text_beside_a_call_is_what_its_thoughts_say():
    """The template writes it as thoughts, as long as no answer follows."""
    check(
        chat_template("gptoss"),
        [user("A?"), assistant("Let me look.", RAIN), tool("wet"), assistant("Yes.")],
        [f"{G_ASK}«{analysis('Let me look.')}{G_RAIN}»{G_WET}«{FINAL}Yes.<|return|>»"],
        head=G_ASK,
        tools=TOOLS,
    )


def test_an_answer_ends_otherwise_in_the_history():
    check(
        chat_template("gptoss"),
        rounds("A?", "Yes.", "B?", "No."),
        [f"{G_ASK}«{FINAL}Yes.<|return|>»", f"{G_ASK}{FINAL}Yes.{G_AGAIN}«{FINAL}No.<|return|>»"],
        [OTHER_STOP],
        head=G_ASK,
    )


# ---- R1: `<｜Assistant｜><think>\n` is supplied, and no thought is ever in a text

R_END = "<｜end▁of▁sentence｜>"
R_ASK, R_AGAIN = "<bos><｜User｜>A?<｜Assistant｜>", f"{R_END}<｜User｜>B?<｜Assistant｜>"


def test_thoughts_that_the_template_never_writes():
    template = chat_template("deepseek_r1_distill")
    expected = f"{R_ASK}<think>\n«Tea.\n</think>\n\nYes.{R_END}»"
    check(template, [user("A?"), assistant(THINK + "Yes.")], [expected])
    check(template, [user("A?"), assistant(THINK.removeprefix("<think>\n") + "Yes.")], [expected])  # as servers give it
    check(
        template,
        rounds("A?", THINK + "Yes.", "B?", THINK + "No."),
        # History has the white space behind </think>, as the template splits there and strips nothing.
        [expected, f"{R_ASK}\n\nYes.{R_AGAIN}<think>\n«Tea.\n</think>\n\nNo.{R_END}»"],
        [EARLIER_THOUGHTS],
    )


def test_thoughts_in_a_field_that_the_template_does_not_read_drop_the_pair():
    with dropped("template leaves out content", "reasoning_content (message 2)"):
        tokenize_pair(
            pair_of([user("A?"), assistant("Yes.", reasoning_content="Tea.")]),
            chat_template("deepseek_r1_distill"),
            SETTINGS,
        )


SHORT = [user("A?"), assistant("Yes."), user("B?"), assistant(THINK + "No.")]
THOUGHTFUL = [user("A?"), assistant(THINK + "Never.")]


def test_a_turn_without_thoughts_behind_an_open_block():
    """The first answer has none: counted and kept, masked or dropped. A turn of weight 0 is context."""
    template = chat_template("deepseek_r1_distill")

    def sequences(way):
        got = tokenize_pair(Pair(SHORT, THOUGHTFUL, 1), template, RenderSettings(None, turns_without_reasoning=way))
        assert got.remarks == [NO_REASONING] and got.chosen_weights == []
        return shown_side(template.tokenizer, got)

    second = f"{R_AGAIN}<think>\n«Tea.\n</think>\n\nNo.{R_END}»"
    assert sequences("keep") == [f"{R_ASK}«Yes.{R_END}»" + second.removeprefix(R_END)]
    assert sequences("mask") == [f"{R_ASK}Yes." + second]
    with dropped(NO_REASONING.partition(" (")[0]):
        sequences("drop")
    for way in ("keep", "mask", "drop"):  # with thoughts everywhere nothing is counted
        pair = Pair([user("A?"), assistant(THINK + "Yes.")], THOUGHTFUL, 1)
        assert tokenize_pair(pair, template, RenderSettings(None, turns_without_reasoning=way)).remarks == []


@pytest.mark.parametrize(
    "content", ["<think>\n\n</think>\n\nYes.", "\n</think>\n\nYes."]
)  # as users or servers have it
def test_an_empty_block_that_the_content_closes_was_sampled(content):
    """R1's template takes the block out, Qwen3.5's writes it again, Qwen3.8's puts one of its own before it."""
    check(
        chat_template("deepseek_r1_distill"),
        [user("A?"), assistant(content)],
        [f"{R_ASK}<think>\n«\n</think>\n\nYes.{R_END}»"],
    )
    for name, end in (("qwen3_5_think", "\n"), ("qwen3_8", "")):  # the latter's whole text is no sequence
        expected = f"{ASK}<think>\n«\n</think>\n\nYes.<|im_end|>»{end}"
        check(chat_template(name), [user("A?"), assistant(content)], [expected], head=ASK)


def test_a_thought_that_is_cut_off_was_not_sampled_behind_an_empty_block():
    """Qwen3 writes one before a content without `</think>`: the policy saw nothing of it. Where the prompt opens the
    block, it supplied what the content begins with; where it closes one, the thought stands behind that."""
    cut = [user("A?"), assistant("<think>\ncut off")]
    check(chat_template("qwen3"), cut, [f"{ASK}«<think>\ncut off<|im_end|>»"], head=ASK)
    for name in ("qwen3_5_think", "qwen3_8", "nemotron_3_nano", "deepseek_r1_distill"):
        template = chat_template(name)
        (found,) = side_sequences(Conversation(cut, 1, template)).sequences
        (turn,) = found.turns
        prompt = Conversation(cut, 1, template).prompt(1).text
        assert found.text[: turn.start] == prompt and prompt.endswith("<think>\n")
        assert found.text[turn.start : turn.end] == f"cut off{turn.stop}" and turn.stop


XML_RAIN = "<tool_call>\n<function=get_weather>\n<parameter=city>\nLyon\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("opening", ["<think>\n", ""])
@pytest.mark.parametrize("thought", ["T1\n", "\n"])
def test_a_block_in_the_content_behind_an_empty_one_of_the_template(opening, thought):
    """Qwen3.8 reads thoughts from a field alone. Those of the content are sampled behind what the prompt opens, once,
    whether words or a call follow."""
    own = f"{opening}{thought}</think>\n\n"
    for message, words in ((assistant(own + "Yes."), "Yes."), (assistant(own, RAIN), XML_RAIN)):
        expected = f"{ASK}<think>\n«{thought}</think>\n\n{words}<|im_end|>»"
        check(chat_template("qwen3_8"), [user("A?"), message], [expected], head=ASK, tools=TOOLS)


def test_an_empty_block_that_history_leaves_out():
    """Qwen3 writes it while no question follows. Where the content has it, the policy sampled it."""
    block = "<think>\n\n</think>\n\n"
    messages = rounds("A?", block + "Yes.", "B?", block + "No.")
    expected = [f"{ASK}«{block}Yes.<|im_end|>»", f"{ASK}Yes.{AGAIN}«{block}No.<|im_end|>»"]
    check(chat_template("qwen3"), messages, expected, [THINK_BLOCK])


def test_a_block_of_a_content_that_stands_behind_its_call():
    """Gemma 4 writes the content as it is, behind the call."""
    call, ask = (
        '<|tool_call>call:get_weather{city:<|"|>Lyon<|"|>}<tool_call|>',
        "<|turn>user\nA?<turn|>\n<|turn>model\n",
    )
    messages = [user("A?"), assistant("T1</think>Wait.", RAIN)]
    check(chat_template("gemma4_v2"), messages, [f"{ask}«{call}T1</think>Wait.<turn|>»"], head=ask, tools=TOOLS)


def test_an_empty_block_before_a_call():
    expected = f"{ASK}<think>\n«\n</think>\n\n{XML_RAIN}<|im_end|>»\n"
    messages = [user("A?"), assistant("<think>\n\n</think>\n\n", RAIN)]
    check(chat_template("qwen3_5_think"), messages, [expected], head=ASK, tools=TOOLS)


# ---- GLM-4: no end of turn of its own, the next role's token is what is sampled last


def test_the_next_role_s_token_ends_a_turn():
    """A last turn is closed as it is at inference: <|observation|> behind a call, <|user|> behind an answer."""
    template, head = chat_template("glm4moe"), "<|user|>\nA?<|assistant|>"
    call = "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Lyon</arg_value>\n</tool_call>"
    calls = [user("A?"), assistant("", RAIN, reasoning_content="T1")]
    first = f"{head}«\n<think>T1</think>{call}<|observation|>»"
    check(template, calls, [first], head=head, tools=TOOLS)
    both = [*calls, tool("wet"), assistant("Yes.", reasoning_content="T2")]
    answer = "\n<tool_response>\nwet\n</tool_response><|assistant|>«\n<think>T2</think>\nYes.<|user|>»"
    check(template, both, [first + answer], head=head, tools=TOOLS)
    check(
        template,
        [*both, user("B?"), assistant("No.", reasoning_content="T3")],
        [
            first + answer,
            f"{head}\n<think></think>{call}<|observation|>\n<tool_response>\nwet\n</tool_response><|assistant|>\n"
            "<think></think>\nYes.<|user|>\nB?<|assistant|>«\n<think>T3</think>\nNo.<|user|>»",
        ],
        [EARLIER_THOUGHTS],
        head=head,
        tools=TOOLS,
    )


def test_an_answer_behind_an_answer_ends_as_any_other():
    """The header that follows ends no turn at inference: GLM's first answer is closed by <|user|>."""
    messages, head = [user("A?"), assistant("Yes."), assistant("No.")], "<|user|>\nA?<|assistant|>\n<think></think>"
    expected = [f"{head}«\nYes.<|user|>»", f"{head}\nYes.<|assistant|>\n<think></think>«\nNo.<|user|>»"]
    check(chat_template("glm4moe"), messages, expected, [OTHER_STOP], head="<|user|>")


def test_a_header_that_history_leaves_out_is_no_think_block():
    """Gemma 4 writes none between two answers, and prompts with one."""
    messages, ask = [user("A?"), assistant("Yes."), assistant("No.")], "<|turn>user\nA?<turn|>\n<|turn>model\n"
    got = check(chat_template("gemma4"), messages, [f"{ask}«Yes.<turn|>»\n<|turn>model\n«No.<turn|>»"], head=ask)
    assert NO_REASONING not in got.remarks


# ---- what no template of TRL's does

MOVED = ChatTemplate(
    tokenizer_for(
        "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{{ '[INST] ' + (system if ns.n == asked | length else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        eos="</s>",
    )
)


def test_a_system_message_before_the_last_question():
    """As Mistral's templates have it."""
    system = SYSTEM["content"] + "\n\n"
    check(
        MOVED,
        [SYSTEM, *rounds("A?", "Yes.", "B?", "No.")],
        [
            f"<bos>[INST] {system}A?[/INST]« Yes.</s>»",
            f"<bos>[INST] A?[/INST] Yes.</s>[INST] {system}B?[/INST]« No.</s>»",
        ],
        [SYSTEM_MOVED],
    )
    one = "<bos>[INST] A?[/INST]« Yes.</s>»[INST] B?[/INST]« No.</s>»"
    check(MOVED, rounds("A?", "Yes.", "B?", "No."), [one])


def test_a_turn_in_the_middle_that_begins_with_line_breaks():
    """The history's `assistant\\n` + `\\n\\nYes.` has the token `\\n\\n` across the turn's begin: the next prompt has
    other tokens than those sampled, in the same text."""
    template = ChatTemplate(byte_level("ĊĊ"))
    got = check(
        template,
        rounds("A?", "\n\nYes.", "B?", "No."),
        [f"{ASK}«\n\nYes.<|im_end|>»", f"{ASK}\n\nYes.{AGAIN}«No.<|im_end|>»"],
        [RETOKENIZED],
    )
    (first, _), (second, _) = sequences_of(got)
    # Positions of mask_checks.py: the header's line break is token 20. Behind it were sampled \n, \n and Y; in history
    # token 20 is two line breaks, 21 the third.
    names = template.tokenizer.convert_ids_to_tokens
    assert first[:20] == second[:20]
    assert names(first[20:24]) == ["Ċ", "Ċ", "Ċ", "Y"] and names(second[20:23]) == ["ĊĊ", "Ċ", "Y"]
    assert check(
        LETTERS, rounds("A?", "\n\nYes.", "B?", "No."), [f"{ASK}«\n\nYes.<|im_end|>»{AGAIN[10:]}«No.<|im_end|>»\n"]
    )


def own(body, prompt="<|im_start|>assistant\n"):
    """A template that writes each message by `body`, in which h is its header and c its content."""
    head = "{% set h, c = '<|im_start|>' + m.role + '\n', m.content %}"
    source = f"{{% for m in messages %}}{head}{body}{{% endfor %}}{{# <|im_end|> #}}"
    return ChatTemplate(tokenizer_for(source + "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"))


def test_white_space_that_only_history_strips():
    """The last message is written as it is, earlier ones without white space at their edges."""
    template = own("{{ h + (c if loop.last else c.strip()) + '<|im_end|>\n' }}")
    check(
        template,
        rounds("A?", "Yes.\n", "B?", "No."),
        [f"{ASK}«Yes.\n<|im_end|>»", f"{ASK}Yes.{AGAIN}«No.<|im_end|>»"],
        [WHITE_SPACE],
    )


# ---- weights, lengths, and text that plays a conversation


def test_turn_weights_over_two_sequences():
    """The loop's call weighs 0.5, its answer 2, the last answer 1: each supervised token has its turn's, context 1."""
    template = chat_template("qwen3")
    rejected = [*LOOP[:5], assistant("Never.")]
    weights = [1.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    got = tokenize_pair(Pair(LOOP, rejected, 1, TOOLS, weights=(weights, [])), template, SETTINGS)
    per_turn = []
    for _, mask, of_tokens in sequences_of(got, "chosen", "weights"):
        begins = turn_begins(mask).cumsum()
        spans = {k: {w for t, w in enumerate(of_tokens) if mask[t] and begins[t] == k} for k in set(begins) - {0}}
        per_turn.append([spans[k] for k in sorted(spans)])
        assert {w for t, w in enumerate(of_tokens) if not mask[t]} == {1.0}
    assert per_turn == [[{0.5}, {2.0}], [{1.0}]]
    assert got.rejected_weights == []


def test_a_turn_of_weight_0_is_context_in_its_sequence():
    template = chat_template("qwen3")
    rejected = [*LOOP[:5], assistant("Never.")]
    got = tokenize_pair(Pair(LOOP, rejected, 1, TOOLS, weights=([1, 1, 1, 1, 1, 0], [])), template, SETTINGS)
    assert [sum(mask) > 0 for _, mask in sequences_of(got)] == [True, False]


TWO = [user("A?"), assistant("Yes.", reasoning_content="T1"), user("B?"), assistant("No.", reasoning_content="T2")]
ONE = [user("A?"), assistant("Never.", reasoning_content="T1")]


def letters_of(name):
    """A token is a character, or a special one."""
    return ChatTemplate(tokenizer_for(trl_template(name), "letters"))


def test_max_length_is_of_each_sequence():
    """Lengths by hand, a token a character or marker; both sequences together are longer than any limit here, and the
    whole text, which ends in a line break, is no sequence.

        1   <|im_start|> user\\n A? <|im_end|> \\n <|im_start|> assistant\\n        1 + 5 + 2 + 1 + 1 + 1 + 10 = 21
            <think> \\nT1\\n </think> \\n\\n Yes. <|im_end|>                       1 + 4 + 1 + 2 + 4 + 1 = 13
        2   21, Yes. <|im_end|> \\n, <|im_start|> user\\n B? <|im_end|> \\n         21 + 6 + 10 = 37
            <|im_start|> assistant\\n, <think> \\nT2\\n </think> \\n\\n No. <|im_end|>  11 + 12 = 23
    """
    template = letters_of("qwen3")
    pair = Pair(TWO, ONE, 1)
    got = tokenize_pair(pair, template, RenderSettings(60))
    assert got.chosen_lengths == [34, 60] and got.longest == 60 and not got.cut
    with dropped("over-long") as caught:
        tokenize_pair(pair, template, RenderSettings(59))
    assert caught.value.longest >= 60


def test_keep_start_cuts_each_sequence():
    """Its first 52 tokens each: of the second turn's 12 <think>, \\n, T and 2 are left; below 49, none."""
    template = letters_of("qwen3")
    got = tokenize_pair(Pair(TWO, ONE, 1), template, RenderSettings(52, "keep_start"))
    assert got.chosen_lengths == [34, 52] and got.cut and got.longest == 60
    assert shown_side(template.tokenizer, got) == [
        f"{ASK}«{thought('T1')}Yes.<|im_end|>»",
        f"{ASK}Yes.{AGAIN}«<think>\nT2»",
    ]
    with dropped("last turn lost"):
        tokenize_pair(Pair(TWO, ONE, 1), template, RenderSettings(48, "keep_start"))


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss"])
def test_hostile_tool_output_moves_no_boundary(name):
    """Text that plays whole exchanges is what the tool said, in each sequence, and each turn what it is beside tame
    output."""
    template, field = chat_template(name), "thinking" if name == "gptoss" else "reasoning_content"

    def supervised(output):
        messages = [{k if k != "reasoning_content" else field: v for k, v in m.items()} for m in LOOP]
        messages[2] = tool(output)
        got = tokenize_pair(pair_of(messages, tools=TOOLS), template, SETTINGS)
        assert all(template.tokenizer.decode(ids).count("wet") == output.count("wet") for ids, _ in sequences_of(got))
        runs = [text.split("«")[1:] for text in shown_side(template.tokenizer, got)]
        return [[run.split("»")[0] for run in of_sequence] for of_sequence in runs]

    attack = hostile(name, "wet").replace("«", "")
    assert supervised(attack) == supervised("wet")
    assert [len(runs) for runs in supervised(attack)] == [2, 1]


def test_a_search_for_headers_would_fail_on_that_output():
    """The negative control: masks by search in each sequence's text find turns in the tool's output."""
    template = chat_template("qwen3")
    messages = [*LOOP[:2], tool(hostile("qwen3", "wet")), *LOOP[3:]]
    got = tokenize_pair(pair_of(messages, tools=TOOLS), template, SETTINGS)
    for ids, mask in sequences_of(got):
        assert template.tokenizer.decode(ids).count("<|im_start|>assistant\n") > turn_begins(mask).sum() + 1


def test_each_turn_is_supervised_once():
    """Though the second sequence has the first two turns in its history; turns of the prompt are never."""
    got = tokenize_pair(pair_of(LOOP, tools=TOOLS), chat_template("qwen3"), SETTINGS)
    texts = shown_side(chat_template("qwen3").tokenizer, got)
    for words in ("T1", "T2", "T3", "Yes.", "No."):
        inside = [run.split("»")[0] for text in texts for run in text.split("«")[1:]]
        assert sum(words in run for run in inside) == 1, words
    assert sum("Yes." in text for text in texts) == 2
    later = tokenize_pair(pair_of(LOOP, n_prompt=5, tools=TOOLS), chat_template("qwen3"), SETTINGS)
    assert [text.count("«") for text in shown_side(chat_template("qwen3").tokenizer, later)] == [1]


# ---- one text or turn by turn

WATCHED = ("qwen3", "qwen3_5_think", "qwen3_8", "glm4moe", "gptoss", "lfm2_2_5")
CASES = [
    (name, conversation)
    for i, name in enumerate(sorted(ROWS))
    for k, conversation in enumerate(CONVERSATIONS)
    if name in WATCHED or (i + k) % 6 == 0
]


def block_is_lost(side):
    """Whether a turn, written as the last message, has an empty think block that is gone once others follow it."""
    for i in side.trained[:-1]:
        alone, whole = side.up_to(i).text, side.text
        begin = max(alone.rfind("<", 0, common_prefix(alone, whole) + 1), 0)
        if EMPTY_THINK.match(alone, begin) and not EMPTY_THINK.match(whole, begin):
            return True
    return False


def test_turn_by_turn_gives_what_one_text_gives():
    """Up to the last supervised token, but for sides of which the text leaves an empty think block out that each turn
    alone has: those are as many sequences as turns, or fewer. On a sixth of the truth tables, and all of six."""
    seen = Counter()
    for name, conversation in CASES:
        messages = CONVERSATIONS[conversation](name)
        tools = TOOLS if any("tool_calls" in m for m in messages) else None
        side = Conversation(messages, 1 + (messages[0]["role"] == "system"), chat_template(name), tools)
        try:
            one, turns = in_one_text(side), by_turns(side)
        except DropPair:
            seen["dropped"] += 1
            continue
        if one is None:
            seen["no text holds it"] += 1
        elif block_is_lost(side):
            seen["a block is lost"] += 1
            assert len(turns) > 1 and THINK_BLOCK in [s.why for s in turns]
        else:
            seen["the same"] += 1
            [merged], end = turns, max(t for t, m in enumerate(one.mask) if m) + 1
            assert (merged.ids, merged.mask) == (one.ids[:end], one.mask[:end]), (name, conversation)
            assert not any(one.mask[end:])
    assert seen["the same"] > 100 and min(seen.values()) >= 5, seen


# ---- prompts that continue each other, tokenized by what is new

CHAT = CHATML + "{# <tool_call></tool_call> #}"


def metaspace(scheme):
    tokenizer = copy.deepcopy(tokenizer_for(CHAT, "metaspace"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return tokenizer


def llama():
    """A normalizer puts a space before each text between added tokens, and nothing splits it."""
    tokenizer = copy.deepcopy(tokenizer_for(CHAT, "metaspace"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    return tokenizer


KINDS = {
    "byte": lambda: tokenizer_for(CHAT),
    **{f"metaspace, {scheme}": partial(metaspace, scheme) for scheme in ("always", "never", "first")},
    "llama": llama,
}
PIECES = ["<|im_end|>", "<|im_start|>", "user\n", "assistant\n", "The answer is 12.", " ", "\n", "\n\n", "12", "▁",
          "🙂", "é", "<tool_call>", "<|im", "_end|>"]  # fmt: skip


class CutInAWord(PromptTokens):
    """The wrong twin: what two texts have in common stays, wherever it ends."""

    def _shared(self, text, same):
        keep = sum(end <= same for _, end in self._ranges)
        return keep, self._ranges[keep - 1][1] if keep else 0


def agrees(prompts, tokenizer, texts):
    return all(prompts.of(text) == tokenize(text, tokenizer) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_tokens_of_whole_texts(kind, monkeypatch):
    monkeypatch.setattr(PromptTokens, "CHECKED", 0)  # it would notice, and mend it
    tokenizer, tried = KINDS[kind](), Counter()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(
        st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), min_size=2, max_size=5), st.integers(0, 9)
    )
    def check_all(pieces, cut):
        whole = "".join(pieces)
        texts = ["".join(pieces[: k + 1]) for k in range(len(pieces))] + [whole[: -1 - cut], whole]
        assert agrees(PromptTokens(tokenizer), tokenizer, texts)
        tried["wrong twin"] += not agrees(CutInAWord(tokenizer), tokenizer, texts)

    check_all()
    assert tried["wrong twin"] > 20


@pytest.mark.parametrize("kind", KINDS)
def test_ids_alone_are_those_of_tokenize(kind):
    """In many threads at a time too, as sampling asks for them."""
    tokenizer, texts = KINDS[kind](), list(map("".join, itertools.permutations(PIECES, 3)))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(partial(token_ids, tokenizer=tokenizer), texts))
    assert found == [tokenize(text, tokenizer)[0] for text in texts]


def test_where_a_cut_gives_other_tokens_texts_are_tokenized_as_a_whole(monkeypatch):
    """The check of the first texts: "The ans" and "The answer is" have another token where the first one ends."""
    monkeypatch.setattr(PromptTokens, "checked", 0)
    tokenizer = tokenizer_for(CHAT)
    prompts = CutInAWord(tokenizer)
    assert agrees(prompts, tokenizer, ["The ans", "The answer is", "The answer is 12."])
    assert prompts._whole


@dataclass
class Counting:
    """A tokenizer's engine that counts the characters it is given."""

    engine: Tokenizer
    characters: list[int]

    def encode(self, text, **more):
        self.characters.append(len(text))
        return self.engine.encode(text, **more)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "gptoss"])
def test_what_is_tokenized_is_linear_in_turns(name, monkeypatch):
    """Twice the turns are about twice the characters for the tokenizer, though of qwen3 and gpt-oss each is a sequence
    with all history. The wrong twin, whole texts, takes four times as many."""
    monkeypatch.setattr(PromptTokens, "CHECKED", 0)
    thought = {"qwen2_5": {}, "qwen3": {"reasoning_content": "T"}, "gptoss": {"thinking": "T"}}[name]
    template, given = chat_template(name), list[int]()
    for engine in ("_untrimmed", "_continuing"):
        real = getattr(spans, engine)
        monkeypatch.setattr(spans, engine, lambda tokenizer, real=real: Counting(real(tokenizer), given))

    def characters(turns):
        texts = [f"{k}: The answer is right, and so is this." for k in range(2 * turns)]
        messages = [assistant(t, **thought) if k % 2 else user(t) for k, t in enumerate(texts)]
        given.clear()
        sequences = tokenize_pair(pair_of(messages), template, SETTINGS).chosen_lengths
        assert len(sequences) == (0 if name == "qwen2_5" else turns)
        return sum(given)

    few, many = characters(8), characters(16)
    assert many < 2.1 * few
    monkeypatch.setattr(PromptTokens, "_shared", lambda self, text, same: (0, 0))
    if name != "qwen2_5":
        assert characters(32) > 3 * characters(16)
