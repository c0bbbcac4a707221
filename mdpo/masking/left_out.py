"""What a chat template leaves out of conversations that are kept all the same: remarks, so that it is counted."""

from typing import Any

from mdpo.masking.sentinels import Marks
from mdpo.types import Message

THOUGHTS = "thoughts that the template leaves out of trained turns"
EARLIER_THOUGHTS = "thoughts that the template leaves out of the prompt's turns"
EARLIER_TURN = "text or calls that the template leaves out of the prompt's turns"
TOOLS = "tools that the template does not write"
UNCLOSED = "a last turn that the template writes no end of: where to stop is not learned from it"
SPACE = "a turn's header behind other white space than its generation prompt's"
FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # names of DeepSeek and Qwen, of OpenRouter and vLLM, of gpt-oss


def left_out(messages: list[Message], n_prompt: int, marks: Marks) -> list[str]:
    """Remarks on assistant messages. User, tool and system text that is left out drops the pair elsewhere."""
    remarks = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i < n_prompt and any(marks.start(s) is None or marks.end(s) is None for s in marks.of(i)):
            remarks.append(EARLIER_TURN)
        if (thoughts := _thoughts(message)) and not _written(thoughts, i, marks):
            remarks.append(THOUGHTS if i >= n_prompt else EARLIER_THOUGHTS)
    return remarks


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


def _thoughts(message: Message) -> list[str]:
    """The texts of a message's reasoning without their white space, whether in fields or before `</think>`."""
    texts = [message[name] for name in FIELDS if isinstance(message.get(name), str)]
    thought, tag, visible = (message.get("content") or "").rpartition("</think>")
    if tag and visible.strip():
        texts.append(thought.strip().removeprefix("<think>"))
    return [squeezed for text in texts if (squeezed := "".join(text.split()))]


def _written(thoughts: list[str], i: int, marks: Marks) -> bool:
    """Whether the thoughts are between what is before message `i` and its own content, white space aside."""
    opening = marks.opening(i)
    before = "".join(marks.text[marks.end_before(i) : opening].split())
    return all(thought in before for thought in thoughts)
