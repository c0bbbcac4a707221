"""How each chat template that TRL ships writes a conversation, written down by reading the template's source.

The tables are in tests/masks, a file a family: for each template the fields of `Row` below, in `tools` those of
`Tools`; functions by name (`CALLS`, `WRITERS`), and with `like` only what differs from another template. A template
that writes calls in a form of its own adds a function here.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml
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
    text_parts: bool = False  # content is a list of parts
    json_arguments: bool = False  # arguments are concatenated as strings
    drops: dict[str, str | list[str]] | None = None  # conversation of the mask tests -> the key of its pair's DropPair,
    # or [key, what else tells its reason]


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
    said = f"<|channel|>analysis<|message|>{content}<|end|><|start|>assistant" if content else ""
    return f"{said} to=functions.{name}<|channel|>commentary json<|message|>{as_json(args)}"


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


# ---- the tables: tests/masks/FAMILY.yaml

MASKS = Path(__file__).parents[1] / "masks"
CALLS = {
    "hermes": hermes_call,
    "qwen3.5": qwen3_5_call,
    "qwen3.6": partial(qwen3_5_call, other=as_json),  # true, not True
    "nemotron": nemotron_call,
    "glm4": glm_call,
    "lfm2": lfm_call,
    "lfm2 with escapes": partial(lfm_call, escape=True),
    "llama3.1": llama_call,
    "gpt-oss": gptoss_call,
    "muse": muse_call,
    "gemma4": gemma4_call,
    "deepseek": deepseek_call,
    None: None,
}
WRITERS = {  # (content, whether it is the conversation's last message) -> what is written of it
    "as it is": lambda text, last=False: text,
    "strip": lambda text, last=False: text.strip(),
    "rstrip": lambda text, last=False: text.rstrip(),
    "strip newlines before the last content": lambda text, last: text.lstrip("\n") if last else text,
    "json": as_json,
}
FUNCTIONS = {"call": CALLS, "output": WRITERS, "clean": WRITERS, "clean_user": WRITERS}


def with_functions(entry: dict) -> dict:
    """The names of functions become functions; unknown ones raise KeyError."""
    return {key: FUNCTIONS[key][value] if key in FUNCTIONS else value for key, value in entry.items()}


def resolved(name: str, entries: dict[str, dict]) -> dict:
    """An entry; fields that it lacks come from the entry that it is `like`, and so do those of its tools."""
    fields = dict(entries[name])
    base = resolved(fields.pop("like"), entries) if "like" in fields else {}
    tools = {**(base.get("tools") or {}), **(fields.get("tools") or {})}
    return {**base, **fields, "tools": tools or None}


def read_rows(texts: Iterable[str]) -> dict[str, Row]:
    """Rows by the names of their templates; an entry whose name begins with _ is for others to be like."""
    entries: dict[str, dict] = {}
    for text in texts:
        loaded = yaml.safe_load(text)
        assert not set(entries) & set(loaded)
        entries |= loaded
    rows = {}
    for name in (name for name in entries if not name.startswith("_")):
        entry = with_functions(resolved(name, entries))
        tools = entry.pop("tools")
        rows[name] = Row(**entry, tools=Tools(**{"call": None, **with_functions(tools)}) if tools else None)
    return rows


ROWS = read_rows(path.read_text(encoding="utf-8") for path in sorted(MASKS.glob("*.yaml")))


@cache
def chat_template(name, kind="byte"):
    return ChatTemplate(tokenizer_for(trl_template(name), kind))
