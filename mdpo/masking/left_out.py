"""What a chat template leaves out of conversations, and remarks on it where a pair is kept all the same."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mdpo.masking.sentinels import Marks
from mdpo.types import Message

if TYPE_CHECKING:
    from mdpo.masking.conversation import Conversation, Marked

THOUGHTS = "thoughts in a field that the template does not know"
EARLIER_TURN = "text or calls that the template leaves out of the prompt's turns"
TOOLS = "tools that the template does not write"
FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # names of DeepSeek and Qwen, of OpenRouter and vLLM, of gpt-oss
KNOWN = re.compile(rf"(?<!\w)({'|'.join(FIELDS)})(?!\w)|think>")


def remarks_of(conversation: "Conversation", marks: Marks) -> list[str]:
    """Remarks on a side that is kept; `marks` are those of its text, or of its last prompt. User, tool and system text
    and turns that are left out drop the pair elsewhere."""
    messages, remarks = conversation.messages, []
    for i in range(conversation.n_prompt):
        slots = marks.of(i) if messages[i]["role"] == "assistant" else []
        if any(marks.start(s) is None or marks.end(s) is None for s in slots):
            remarks.append(EARLIER_TURN)
    fields = (name for i in conversation.trained for name in FIELDS if isinstance(messages[i].get(name), str))
    if unread(conversation.template) and any(fields):
        remarks.append(THOUGHTS)
    if conversation.tools and lacks_tools(conversation.tools, messages, marks):
        remarks.append(TOOLS)
    return list(dict.fromkeys(remarks))


def lacks_tools(tools: list[dict[str, Any]], messages: list[Message], marks: Marks) -> bool:
    """Whether a tool's name is missing from what the template wrote before the first message and before those of users
    and the system: names in calls and in what tools answer do not count."""
    functions = (tool.get("function") or tool for tool in tools)
    missing = {f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)}
    for i, message in enumerate(messages):
        if not missing:
            break
        if (i == 0 or message["role"] not in ("assistant", "tool")) and (opening := marks.opening(i)) is not None:
            before = marks.text[marks.end_before(i) : opening]
            missing = {name for name in missing if name not in before}
    return bool(missing)


def unread(template) -> bool:
    """Whether a chat template knows of no reasoning: a message's field of it is one that nothing reads."""
    return not _knows(str(template.tokenizer.chat_template))


@lru_cache(maxsize=64)
def _knows(source: str) -> bool:
    return KNOWN.search(source) is not None


def thoughts(message: Message) -> list[str]:
    """The texts of an assistant message's reasoning without their white space, whether in fields or before
    `</think>`."""
    if message["role"] != "assistant":
        return []
    texts = [message[name] for name in FIELDS if isinstance(message.get(name), str)]
    thought, tag, visible = (message.get("content") or "").rpartition("</think>")
    if tag and (visible.strip() or message.get("tool_calls")):
        texts.append(thought.strip().removeprefix("<think>"))
    return [squeezed for text in texts if (squeezed := "".join(text.split()))]


def written(texts: list[str], i: int, marks: Marks) -> bool:
    """Whether thoughts are between what is before message `i` and its own content, white space aside."""
    opening = marks.opening(i)
    before = "".join(marks.text[marks.end_before(i) : opening].split())
    return all(thought in before for thought in texts)


def unwritten_field(message: Message, i: int, marks: Marks) -> str | None:
    """The field of message `i` with thoughts that are not in the text; None where those of all fields are."""
    fields = {name: "".join(message[name].split()) for name in FIELDS if isinstance(message.get(name), str)}
    return next((name for name, text in fields.items() if text and not written([text], i, marks)), None)


def lost(own: list[str], i: int, rendered: "Marked", conversation: "Conversation") -> bool:
    """Whether thoughts of turn `i` are not in the text: those of its content, or of a field that the template reads."""
    if not own or written(own, i, rendered.marks):
        return False
    name = unwritten_field(conversation.messages[i], i, rendered.marks)
    return name is None or not unread(conversation.template)
