"""How each chat template that TRL ships writes a conversation, written down by reading the template's source."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from tiny import tokenizer_for, trl_template

from mdpo.masking.chat_template import ChatTemplate


@dataclass(frozen=True)
class Tools:
    """Tool calls and tool messages. Tool messages that follow each other are one group: `open`, the messages, each
    within `each`, with `join` between them, `close`."""

    call: Callable[[str, list], str] | None  # (content, calls) -> what the policy samples, without its stop
    each: tuple[str, str]
    open: str = ""
    join: str = ""
    close: str = ""
    stop: str | dict | None = None  # ends a turn with calls; None: the same as any turn
    after: str | None = None
    header: str | None = None  # supplied by the generation prompt after a tool message; None: the same as after a user
    output: Callable[[str], str] = str  # how a tool's output is written
    needs_call: bool = False  # a tool message with no call before it is left out


@dataclass(frozen=True)
class Row:
    user: tuple[str, str]
    header: str
    stop: str | dict[str | None, str]  # by the role of the next message, where that decides (None: nothing follows)
    after: str = ""
    lead: str = ""
    block: str = ""  # empty think block
    has_block: str = "always"  # always; last: the last message only; query: messages after the last user message
    tools: Tools | None = None  # None: tool messages are refused or left out
    clean: Callable[[str, bool], str] = lambda text, last: text  # what is written of an assistant's content
    clean_user: Callable[[str], str] = str
    end: str = ""  # behind everything


def strip(text, last=False):
    return text.strip()


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def hermes_call(content, calls):  # <tool_call> with a JSON object, calls and content on lines of their own
    lines = [f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(args)}}}\n</tool_call>' for name, args in calls]
    return "\n".join([content, *lines] if content else lines)


def parameters(args, other):  # strings as they are, objects and lists as JSON, the rest as `other` writes it
    def write(value):
        return value if isinstance(value, str) else as_json(value) if isinstance(value, dict | list) else other(value)

    return "".join(f"<parameter={k}>\n{write(v)}\n</parameter>\n" for k, v in args.items())


def qwen3_5_call(content, calls, other=str):
    blocks = [f"<tool_call>\n<function={n}>\n{parameters(args, other)}</function>\n</tool_call>" for n, args in calls]
    return (f"{content}\n\n" if content else "") + "\n".join(blocks)


def nemotron_call(content, calls):
    blocks = [f"<tool_call>\n<function={n}>\n{parameters(args, str)}</function>\n</tool_call>\n" for n, args in calls]
    return f"{content}\n" + "".join(blocks)


def glm_call(content, calls):
    def pairs(args):
        write = {k: v if isinstance(v, str) else as_json(v) for k, v in args.items()}
        return "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in write.items())

    return (f"\n{content}" if content else "") + "".join(f"\n<tool_call>{n}\n{pairs(a)}</tool_call>" for n, a in calls)


def lfm_call(content, calls, escape=False):
    def quote(value):
        if escape:
            value = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return f"'{value}'"

    def pairs(args):
        return ", ".join(f"{k}={quote(v) if isinstance(v, str) else v}" for k, v in args.items())

    return f"{content}<|tool_call_start|>[{', '.join(f'{n}({pairs(a)})' for n, a in calls)}]<|tool_call_end|>"


def llama_call(content, calls):
    [(name, args)] = calls
    return f'{{"name": "{name}", "parameters": {as_json(args)}}}'


def gptoss_call(content, calls):
    [(name, args)] = calls
    return f" to=functions.{name}<|channel|>commentary json<|message|>{as_json(args)}"


def muse_call(content, calls):
    def write(args):
        args = {k: v if isinstance(v, str) else as_json(v) for k, v in args.items()}
        return "".join(f'<atem:parameter name="{k}">{v}</atem:parameter>\n' for k, v in args.items())

    blocks = [
        f' to={n}<|message|><atem:function_calls>\n<atem:invoke name="{n}">\n{write(args)}</atem:invoke>\n'
        "</atem:function_calls>"
        for n, args in calls
    ]
    return "<|eom|><|start|>assistant".join(blocks)


def gemma4_call(content, calls):  # the content stands behind the calls; keys are sorted, JSON has no spaces
    def write(value):
        return f'<|"|>{value}<|"|>' if isinstance(value, str) else as_json(value).replace(" ", "")

    def pairs(args):
        return ",".join(f"{k}:{write(v)}" for k, v in sorted(args.items()))

    return "".join(f"<|tool_call>call:{name}{{{pairs(args)}}}<tool_call|>" for name, args in calls) + content


def deepseek_call(content, calls):
    blocks = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(args)}\n```<｜tool▁call▁end｜>"
        for name, args in calls
    ]
    return f"{content}<｜tool▁calls▁begin｜>" + "\n".join(blocks) + "<｜tool▁calls▁end｜>"


CHATML_ROW = Row(("<|im_start|>user\n", "<|im_end|>\n"), "<|im_start|>assistant\n", "<|im_end|>", after="\n")
QWEN_TOOLS = Tools(hermes_call, ("\n<tool_response>\n", "\n</tool_response>"), "<|im_start|>user", "", "<|im_end|>\n")
QWEN3_5 = replace(
    CHATML_ROW,
    block="<think>\n\n</think>\n\n",
    has_block="query",
    tools=replace(QWEN_TOOLS, call=qwen3_5_call, output=strip),
    clean=strip,
    clean_user=strip,
)
QWEN3_6 = replace(QWEN3_5, tools=replace(QWEN3_5.tools, call=partial(qwen3_5_call, other=as_json)))  # true, not True
NEMOTRON = replace(
    CHATML_ROW,
    block="<think></think>",
    tools=Tools(
        nemotron_call, ("<tool_response>\n", "\n</tool_response>\n"), "<|im_start|>user\n", "", close="<|im_end|>\n"
    ),
    clean=lambda text, last: text.rstrip(),  # the block is put before the content, then both are stripped together
)
LFM_TOOLS = Tools(lfm_call, ("<|im_start|>tool\n", "<|im_end|>\n"))
LFM2_TOOLS = Tools(None, ("<|im_start|>tool\n<|tool_response_start|>", "<|tool_response_end|><|im_end|>\n"))
LLAMA = Row(
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    clean=strip,
    clean_user=strip,
    tools=Tools(None, ("<|start_header_id|>tool<|end_header_id|>\n\n", "<|eot_id|>"), output=strip),
)
LLAMA_TOOLS = Tools(llama_call, ("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"), output=as_json)
GEMMA = Row(
    ("<start_of_turn>user\n", "<end_of_turn>\n"),
    "<start_of_turn>model\n",
    "<end_of_turn>",
    after="\n",
    clean=strip,
    clean_user=strip,
)
# A tool call is closed by the opening token of the tool's response, which stands in the same turn; no header follows.
GEMMA4 = Row(
    ("<|turn>user\n", "<turn|>\n"),
    "<|turn>model\n",
    "<turn|>",
    after="\n",
    clean=strip,
    clean_user=strip,
    tools=Tools(
        gemma4_call,
        ('response:{name}{value:<|"|>', '<|"|>}<tool_response|>'),
        join="<|tool_response>",
        stop="<|tool_response>",
        after="",
        header="",
        needs_call=True,
    ),
)
COHERE = Row(
    ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    clean=strip,
    clean_user=strip,
)
# Its generation prompt also opens a think block, which no rendered turn has.
DEEPSEEK = Row(
    ("<｜User｜>", ""),
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    tools=Tools(
        deepseek_call,
        ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        open="<｜tool▁outputs▁begin｜>",
        header="<｜tool▁outputs▁end｜>",
    ),
)
PHI3 = Row(("<|user|>\n", "<|end|>\n"), "<|assistant|>\n", "<|end|>", after="\n", end="<eos>")
# The generation prompt ends with the colon: the space is sampled.
IDEFICS = Row(
    ("User: ", "<end_of_utterance>\n"),
    "Assistant:",
    "<end_of_utterance>",
    after="\n",
    lead=" ",
    tools=Tools(None, ("Tool: ", "<end_of_utterance>\n")),
)
ROWS = {
    "cohere": COHERE,
    "cohere2": replace(
        COHERE,
        header=COHERE.header + "<|START_RESPONSE|>",
        stop="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        clean=Row.clean,
        clean_user=str,
    ),
    "deepseek_r1_distill": replace(DEEPSEEK, tools=replace(DEEPSEEK.tools, call=None)),
    "deepseekv3": DEEPSEEK,
    # Writes the header again behind the tool's response, although its generation prompt leaves it out there.
    "diffusion_gemma": replace(GEMMA4, tools=replace(GEMMA4.tools, header="<|turn>model\n")),
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "gemma4_v2": replace(GEMMA4, tools=Tools(gemma4_call, ("<|turn>tool\n", "<turn|>\n"), output=strip)),
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": GEMMA4,
    # No end-of-turn token of its own: the next role's token closes the turn. Without thinking the generation prompt
    # ends right behind </think>, so the newline before the content is sampled.
    "glm4moe": Row(
        ("\n", ""),
        "<|assistant|>",
        {"user": "<|user|>", "tool": "<|observation|>", None: ""},
        lead="\n",
        block="\n<think></think>",
        tools=Tools(glm_call, ("\n<tool_response>\n", "\n</tool_response>")),
        clean=strip,
    ),
    # The policy writes the channel itself.
    "gptoss": Row(
        ("<|start|>user<|message|>", "<|end|>"),
        "<|start|>assistant",
        {"user": "<|end|>", "tool": "<|end|>", None: "<|return|>"},
        lead="<|channel|>final<|message|>",
        tools=Tools(
            gptoss_call,
            ("<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>", "<|end|>"),
            stop="<|call|>",
            output=as_json,
        ),
    ),
    "idefics3": IDEFICS,
    "lfm2": replace(CHATML_ROW, tools=LFM2_TOOLS),
    "lfm2_2_5": replace(CHATML_ROW, tools=LFM_TOOLS),
    "lfm2_2_5_v2": replace(CHATML_ROW, tools=LFM_TOOLS),
    "lfm2_2_5_vl": replace(CHATML_ROW, tools=replace(LFM_TOOLS, call=partial(lfm_call, escape=True))),
    "lfm2_v2": replace(CHATML_ROW, tools=replace(LFM2_TOOLS, call=partial(lfm_call, escape=True))),
    "llama3": LLAMA,
    "llama3_1": replace(LLAMA, tools=LLAMA_TOOLS),
    "llama3_2": replace(LLAMA, tools=LLAMA_TOOLS),
    # No generation prompt at all: the space behind [/INST] is sampled, the one behind </s> is not.
    "llava_next": Row(("[INST] ", " [/INST]"), "", "</s>", after=" ", lead=" "),
    # The policy writes the recipient itself.
    "muse_glimmer": Row(
        ("<|start|>user<|message|>", "<|eot|>"),
        "<|start|>assistant",
        "<|eot|>",
        lead=" to=user<|message|>",
        tools=Tools(
            muse_call, ('<|start|>tool {name}<|message|><tool_output name="{name}">\n', "\n</tool_output><|eot|>")
        ),
    ),
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": replace(CHATML_ROW, tools=QWEN_TOOLS),
    "qwen2_5_vl": replace(CHATML_ROW, tools=replace(LFM_TOOLS, call=None)),
    "qwen3": replace(
        CHATML_ROW,
        block="<think>\n\n</think>\n\n",
        has_block="last",
        tools=QWEN_TOOLS,
        clean=lambda text, last: text.lstrip("\n") if last else text,
    ),
    "qwen3_5_nothink": QWEN3_5,
    "qwen3_5_think": QWEN3_5,
    "qwen3_6": QWEN3_6,
    "qwen3_8": replace(QWEN3_6, has_block="always"),
    "qwen3_instruct_2507": replace(CHATML_ROW, tools=QWEN_TOOLS),
    "qwen3_vl": replace(CHATML_ROW, tools=QWEN_TOOLS),
    "smolvlm": IDEFICS,
}
TEXT_PARTS = {"idefics3", "llava_next", "smolvlm"}  # content is a list of parts
JSON_ARGUMENTS = {"deepseekv3"}  # arguments are concatenated as strings


@cache
def chat_template(name, kind="byte"):
    return ChatTemplate(tokenizer_for(trl_template(name), kind))
