"""Conversations with and without tools, and what templates cannot show of them."""

from templates import glm_call, hermes_call, lfm_call, qwen3_5_call

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


LEFT_OUT = "template leaves out content"
REFUSED = "template refuses the conversation: "
ROLES = REFUSED + "Conversation roles must alternate user/assistant/user/assistant/..."
NO_CONTENT = REFUSED + "'dict object' has no attribute 'content'"
ONE_CALL = REFUSED + "This model only supports single tool-calls at once!"
NO_TOOL_ROLE = REFUSED + "Only user and assistant roles are supported!"
NO_CALL = REFUSED + "Message has tool role, but there was no previous assistant message with a tool call!"
NOT_DERIVABLE = "mask not derivable"


def each(names, reason):
    return dict.fromkeys(names.split(), reason)


ALTERNATE = "cohere cohere2 gemma gemma3"
# Calls are not in the template: they would vanish from the text.
NO_CALLS = "deepseek_r1_distill idefics3 lfm2 llama3 phi3 phi3_5 qwen2_5_vl smolvlm"
NO_TOOLS = {**each(ALTERNATE, ROLES), **each("llava_next", NO_TOOL_ROLE), **each(NO_CALLS, LEFT_OUT)}
SYSTEM_REFUSED = each("gemma", REFUSED + "System role not supported")
SAME_TURN = "diffusion_gemma gemma4 gemma4_v3 gemma4_v4 gemma4_v5"
EXCLUDED = {
    "hostile system": SYSTEM_REFUSED,
    "tool text": {
        **each(ALTERNATE, ROLES),
        **each("llava_next", NO_TOOL_ROLE),
        **each("gptoss", NO_CALL),
        # With no call before it the tool's output is left out: the answer would follow a context that never was.
        **each("gemma4 gemma4_v3 gemma4_v4 gemma4_v5 phi3 phi3_5", LEFT_OUT),
        **each("diffusion_gemma", NOT_DERIVABLE),
    },
    "call last": each(f"{ALTERNATE} llava_next {NO_CALLS}", LEFT_OUT),
    "call, system": {**NO_TOOLS, **SYSTEM_REFUSED},
    # After the first call of a conversation DeepSeek-V3 writes neither the header nor the end of the tool outputs.
    "call, 4 turns": {**NO_TOOLS, **each("deepseekv3", NOT_DERIVABLE)},
    "call with text": {
        **NO_TOOLS,
        **each("gptoss llama3_1 llama3_2 muse_glimmer", LEFT_OUT),
        **each(SAME_TURN, NOT_DERIVABLE),  # the text stands behind the tool's response
    },
    # transformers removes a null content, and these templates do not ask whether there is one
    "call, null content": {
        **NO_TOOLS,
        **each("cohere deepseek_r1_distill deepseekv3 idefics3 llava_next phi3 phi3_5 smolvlm", NO_CONTENT),
        **each("lfm2", REFUSED + "Object of type Undefined is not JSON serializable"),
    },
    "two calls": {**NO_TOOLS, **each("llama3_1 llama3_2", ONE_CALL), **each("gptoss", LEFT_OUT)},
    "call without strings": NO_TOOLS,
    "hostile tool": NO_TOOLS,
    "hostile tool, white space": NO_TOOLS,
}


def pair_of(messages, n_prompt=None, **more):
    """A pair whose rejected side is the same prompt and a short answer."""
    n = n_prompt if n_prompt is not None else [m["role"] for m in messages].index("assistant")
    return Pair(messages, [*messages[:n], assistant("Never.")], n, **more)


THINK = "<think>\nTea.\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
ALL_SAMPLED = [("", THINK + "Yes."), ("", THINK + "No.")]
OPENED = ("<think>\n", "Tea.\n</think>\n\nNo.")  # the generation prompt opens the block
THINKING = {  # both turns have reasoning in their content; several templates remove it from earlier turns
    "qwen3": [("", "Yes."), ("", THINK + "No.")],
    "qwen3_5_think": [("", "Yes."), OPENED],
    "qwen3_5_nothink": [("", "Yes."), OPENED],
    "qwen3_6": [("", "Yes."), OPENED],
    "qwen3_8": [(EMPTY, THINK + "Yes."), (EMPTY, THINK + "No.")],  # it reads reasoning from a field of its own
    "deepseekv3": [("", "\n\nYes."), ("", "\n\nNo.")],
    "deepseek_r1_distill": [("", "\n\nYes."), ("", "\n\nNo.")],
    "glm4moe": [("\n<think></think>", "\nYes."), ("", "\n<think>Tea.</think>\nNo.")],
    "nemotron_3_nano": [("<think></think>", "\n\nYes."), OPENED],
    "nemotron_3_ultra": [("<think></think>", "\n\nYes."), OPENED],
    "lfm2_2_5": [("", "Yes."), ("", THINK + "No.")],
    **dict.fromkeys(["qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "gemma", "cohere", "lfm2"], ALL_SAMPLED),
}
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
    "gemma4": ("", "No."),  # shown with tool calls only
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
