"""Conversations with and without tools, and what templates cannot show of them."""

from templates import ROWS, glm_call, hermes_call, lfm_call, qwen3_5_call

from mdpo.types import Pair


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *calls, **more):
    message = {"role": "assistant", "content": content, **more}
    if calls:
        message["tool_calls"] = [
            {"id": f"id_{n}", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls
        ]
    return message


def tool(content, name="get_weather"):
    return {"role": "tool", "name": name, "tool_call_id": f"id_{name}", "content": content}


SYSTEM = {"role": "system", "content": "You are terse: answer in one word."}
WEATHER = ("get_weather", {"city": "Paris", "note": 'it\'s "here" 🙂'})
CLOCK = ("get_time", {"zone": "日本"})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "A town."}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Looks it up.", "parameters": SCHEMA}}
    for name in ("get_weather", "get_time")
]
REPLIES = ["Twelve.", "答えは12です🙂", "👩‍👩‍👧 née \u0301", "The answer is \\boxed{12}."]


def text_turns(n, question=lambda k: f"Question {k}: what is 3 * {k}? 🙂"):
    return [message for k in range(n) for message in (user(question(k)), assistant(REPLIES[k % 4]))]


def one_call(*calls, content="", output="It is sunny 🙂", answer="Take a hat."):
    outputs = [tool(output, name) for name, _ in calls]
    return [user("How is the weather?"), assistant(content, *calls), *outputs, assistant(answer)]


WITH_CALLS = (
    "call, system", "call, 4 turns", "call with text", "call, null content", "two calls", "call without strings",
    "hostile tool", "hostile tool, white space",
)  # fmt: skip


def drops(row) -> dict[str, tuple[str, ...]]:
    """Conversation -> what `errors.dropped` takes: the key of its pair's DropPair, and details of the reason that tell
    it from another of that key. `calls` stands for all that have calls."""
    own = {name: (reason,) if isinstance(reason, str) else tuple(reason) for name, reason in (row.drops or {}).items()}
    return {**dict.fromkeys(WITH_CALLS if "calls" in own else (), own.pop("calls", ())), **own}


NO_TOOLS = {name for name, row in ROWS.items() if "calls" in (row.drops or {})}
EXCLUDED: dict[str, dict[str, tuple[str, ...]]] = {}
for name, row in ROWS.items():
    for conversation, reason in drops(row).items():
        EXCLUDED.setdefault(conversation, {})[name] = reason


def pair_of(messages, n_prompt=None, **more):
    """A pair whose rejected side is the same prompt and a short answer."""
    n = n_prompt if n_prompt is not None else [m["role"] for m in messages].index("assistant")
    return Pair(messages, [*messages[:n], assistant("Never.")], n, **more)


THINK = "<think>\nTea.\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
ALL_SAMPLED = [("", THINK + "Yes."), ("", THINK + "No.")]
OPENED = ("<think>\n", "Tea.\n</think>\n\nNo.")  # the generation prompt opens the block
OPENED_YES = ("<think>\n", "Tea.\n</think>\n\nYes.")
THINKING = {  # both turns have reasoning in their content; each is sampled with it, whatever history makes of it
    **dict.fromkeys(["qwen3_5_think", "qwen3_6", "nemotron_3_nano", "nemotron_3_ultra"], [OPENED_YES, OPENED]),
    **dict.fromkeys(["deepseekv3", "deepseek_r1_distill"], [OPENED_YES, OPENED]),
    "qwen3_8": [OPENED_YES, OPENED],  # it reads reasoning from a field of its own
    "glm4moe": [("", "\n<think>Tea.</think>\nYes."), ("", "\n<think>Tea.</think>\nNo.")],
    **dict.fromkeys(["qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "gemma", "cohere", "lfm2"], ALL_SAMPLED),
    **dict.fromkeys(["qwen3", "lfm2_2_5"], ALL_SAMPLED),
}
SEVERAL = {*THINKING} - {"qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "gemma", "cohere", "lfm2"}  # sequences
REASONING = {  # one turn, reasoning in a field of its own
    "qwen2_5": ("", "No."),
    "qwen3": ("", THINK + "No."),
    "qwen3_5_think": OPENED,
    "qwen3_8": OPENED,
    "glm4moe": ("", "\n<think>Tea.</think>\nNo."),
    "nemotron_3_nano": ("<think>\n", "Tea.\n</think>\nNo."),
    "nemotron_3_ultra": ("<think>\n", "Tea.</think>No."),
    "lfm2_2_5": ("", "<think>Tea.</think>No."),
    "gptoss": ("", "<|channel|>analysis<|message|>Tea.<|end|><|start|>assistant<|channel|>final<|message|>No."),
    "muse_glimmer": ("", " to=self<|message|>Tea.<|eom|><|start|>assistant to=user<|message|>No."),
    "gemma4_v5": ("", "<|channel>thought\nTea.\n<channel|>No."),
}
JSON_CALL = hermes_call("", [WEATHER])
XML_CALL = qwen3_5_call("", [WEATHER])
THINKING_CALLS = {  # reasoning and nothing else before a tool call, then reasoning before the answer
    "qwen3": [("", THINK + JSON_CALL), ("", THINK + "No.")],
    "qwen3_5_think": [("<think>\n", "Tea.\n</think>\n\n" + XML_CALL), OPENED],
    "nemotron_3_nano": [("<think>\n", "Tea.\n</think>\n" + XML_CALL + "\n"), OPENED],
    "glm4moe": [("", "\n<think>Tea.</think>" + glm_call("", [WEATHER])), ("", "\n<think>Tea.</think>\nNo.")],
    "qwen2_5": [("", THINK + "\n" + JSON_CALL), ("", THINK + "No.")],
    "lfm2_2_5": [("", THINK + lfm_call("", [WEATHER])), ("", THINK + "No.")],
}
