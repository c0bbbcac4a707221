"""What a turn of the policy calls, and how results come back to it, in one of three forms:

template  the chat template's own calls, read by trl's `parse_response`; results are messages of the role tool
text      <tool_call>{"name": …, "arguments": {…}}</tool_call> in the content, for templates that know no tools
python    a ```python block in the content, run by the tool `python`; M-DPO's and ToRA's form (arXiv 2409.02392)
"""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mdpo.console import say
from mdpo.data.tool_calls import read_calls
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.answers import last_boxed
from mdpo.rollouts.response_forms import ADVICE, opener, read_turn, with_response_form
from mdpo.types import Message

CODE = re.compile(r"```python[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
HOW_TO_CALL = """You can call these functions. Write each call as
<tool_call>{"name": "…", "arguments": {…}}</tool_call>
and end your turn: the result comes back in <tool_response>. Answer without a call when you are done.
"""


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class TurnCalls:
    """The message that a turn is, its calls in order, and what is wrong with a call that cannot be read; "" if none."""

    message: Message
    calls: list[Call] = field(default_factory=list)
    malformed: str = ""


class CallForm(Protocol):
    """`opening` adds what the policy has to know of its tools to the first messages; `schemas` are what the template
    gets as `tools`; `read` reads a turn, `of_message` one that a server has read; `results` are messages that answer,
    one text for each call."""

    def opening(self, messages: list[Message]) -> list[Message]: ...
    @property
    def schemas(self) -> list[dict[str, Any]] | None: ...
    def read(self, text: str, ids: list[int], prompt: list[int]) -> TurnCalls: ...
    def of_message(self, message: Message) -> TurnCalls: ...
    def results(self, turn: TurnCalls, texts: list[str]) -> list[Message]: ...


class _InText:
    """Calls are in the text, for us to read."""

    def of_message(self, message: Message) -> TurnCalls:
        """Raises ValueError, which ends the trajectory, where its text is not what the policy said."""
        if message.get("tool_calls"):
            raise ValueError("the server took calls out of the text; with tools, --tool_calls=template")
        return replace(self.read(message["content"], [], []), message=message)

    def read(self, text: str, ids: list[int], prompt: list[int]) -> TurnCalls:
        raise NotImplementedError


class PythonBlocks(_InText):
    """All Python blocks of a turn are one program: earlier turns' variables are gone, as in the data of recipes/. A box
    outside code is the answer, whatever code is beside it: the policy did not wait for its output."""

    schemas = None

    def __init__(self, role: str = "user"):
        self.role = role

    def opening(self, messages: list[Message]) -> list[Message]:
        return messages

    def read(self, text: str, ids: list[int], prompt: list[int]) -> TurnCalls:
        message = {"role": "assistant", "content": text}
        said = visible(text)
        code = code_of(said)
        if code is None or last_boxed(CODE.sub("", said)):  # an empty box only speaks of one
            return TurnCalls(message)
        return TurnCalls(message, [Call("python", {"code": code})])

    def results(self, turn: TurnCalls, texts: list[str]) -> list[Message]:
        ended = (text + "\n" * (text != "" and not text.endswith("\n")) for text in texts)
        return [{"role": self.role, "content": f"```output\n{text}```"} for text in ended]


class TaggedCalls(_InText):
    """Calls as text; the tools are described in the system message, or before the first user message where the template
    takes none."""

    schemas = None

    def __init__(self, tools: list[dict[str, Any]], template: ChatTemplate, role: str = "user"):
        self.role = role
        described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        self.how = f"{HOW_TO_CALL}\n{described}" if tools else ""
        self.takes_system = _renders(template, [("system", "Qz0"), ("user", "Qz1")])

    def opening(self, messages: list[Message]) -> list[Message]:
        if not self.how:
            return messages
        if self.takes_system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.how}, *messages]
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{self.how}" if self.takes_system else
                 f"{self.how}\n\n{first['content']}"}, *messages[1:]]  # fmt: skip

    def read(self, text: str, ids: list[int], prompt: list[int]) -> TurnCalls:
        message = {"role": "assistant", "content": text}
        try:
            calls = [_as_call(json.loads(found)) for found in TAGGED.findall(visible(text))]
        except (ValueError, DropPair) as error:
            return TurnCalls(message, malformed=str(error))
        return TurnCalls(message, calls)

    def results(self, turn: TurnCalls, texts: list[str]) -> list[Message]:
        content = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)
        return [{"role": self.role, "content": content}]


class TemplateCalls:
    """Calls in the template's own syntax. A call that cannot be read is text of the turn, as `parse_response` leaves
    it, and is answered by a message of the role tool, or user where the template wants a call before one."""

    def __init__(self, tools: list[dict[str, Any]], template: ChatTemplate, served: bool = False):
        """`served` calls come from `of_message` alone."""
        self.schemas, self.opener = tools, opener(template, tools)
        self.reader = None if served else with_response_form(template)
        said = [("user", "Qz0"), ("assistant", "Qz1"), ("tool", "Qz2")]
        self.error_role = "tool" if _renders(template, said) else "user"

    def opening(self, messages: list[Message]) -> list[Message]:
        return messages

    def read(self, text: str, ids: list[int], prompt: list[int]) -> TurnCalls:
        message = read_turn(self.reader, ids, prompt, self.schemas)
        try:
            calls = read_calls(message.pop("tool_calls", None))
            if not calls and self.opener in visible(text):
                raise DropPair("the call is not in the form that the tools' description asks for")
        except DropPair as error:
            return TurnCalls({"role": "assistant", "content": text}, malformed=str(error))
        message |= {"tool_calls": calls} if calls else {}
        return TurnCalls(message, [Call(c["function"]["name"], c["function"]["arguments"]) for c in calls])

    def of_message(self, message: Message) -> TurnCalls:
        own = {name: value for name, value in message.items() if name != "tool_calls"}
        try:
            calls = read_calls(message.get("tool_calls"))
        except DropPair as error:
            return TurnCalls(own, malformed=str(error))
        own |= {"tool_calls": calls} if calls else {}
        return TurnCalls(own, [Call(c["function"]["name"], c["function"]["arguments"]) for c in calls])

    def results(self, turn: TurnCalls, texts: list[str]) -> list[Message]:
        if turn.malformed:
            return [{"role": self.error_role, "content": text} for text in texts]
        return [
            {"role": "tool", "name": call.name, "content": text} for call, text in zip(turn.calls, texts, strict=True)
        ]


def call_form(
    kind: str, tools: list[dict[str, Any]], template: ChatTemplate, role: str, served: bool = False
) -> CallForm:
    """The form of that name; `auto` is the template's where it shows tools and its calls can be read; else text, and
    says so. With `served` the server reads them. Raises UserError."""
    if kind == "python":
        return PythonBlocks(role)
    if kind == "text" or not tools:
        return TaggedCalls(tools, template, role)
    try:
        return TemplateCalls(tools, template, served)
    except UserError as error:
        if kind == "template":
            raise
        why = str(error).removeprefix("tool_calls: ").partition(ADVICE)[0]
        say(f"tool calls: written as text and described in the first message, as {why}.")
        return TaggedCalls(tools, template, role)


def visible(text: str) -> str:
    """A turn without its thoughts: what is behind the last </think>, and before a <think> that nothing closes."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def code_of(text: str) -> str | None:
    """The Python blocks of a turn as one program; None where there is none. An unclosed last block extends to the end
    of the text."""
    blocks = CODE.findall(text)
    return "\n".join(blocks) if blocks else None


def _as_call(value: Any) -> Call:
    (call,) = read_calls([value])
    return Call(call["function"]["name"], call["function"]["arguments"])


def _renders(template: ChatTemplate, said: list[tuple[str, str]], **kwargs) -> bool:
    """Whether the template shows each of the messages, (role, content)."""
    try:
        text = template.render([{"role": role, "content": content} for role, content in said], **kwargs)
    except DropPair:
        return False
    return all(content in text for _, content in said)
