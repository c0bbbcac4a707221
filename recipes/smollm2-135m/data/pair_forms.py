"""The forms in which make_pairs.py writes what it has drawn; nothing to run.

Each takes a row's id and its sides, [("right", messages), (kind of mistake, messages), ...], and returns rows.
"""

import json
import re

# By how much chosen has to win, in units of reward: more where no code had printed the wrong answer.
MARGINS = {"wrong_operator": 1.0, "wrong_quantity": 1.0, "ignores_output": 2.0, "no_check": 2.0}
BEFORE, PARTING, AFTER = 0.0, 1.0, 0.25  # turn weights: shared by both sides, where they part, what follows from that
TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs code.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def as_pair(name, sides):
    (_, chosen), (kind, rejected) = sides
    return [{"chosen": chosen, "rejected": rejected, "kind": kind, "id": name}]


def with_margin(name, sides):
    return [{**row, "margin": MARGINS[row["kind"]]} for row in as_pair(name, sides)]


def with_weights(name, sides):
    """Each assistant message with a weight that says how much of the mistake is its own."""
    (row,) = as_pair(name, sides)
    parting = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=False)].index(False)
    for side in ("chosen", "rejected"):
        for at, message in enumerate(row[side]):
            if message["role"] == "assistant":
                message["weight"] = BEFORE if at < parting else PARTING if at == parting else AFTER
    return [row]


def as_trajectories(name, sides):
    """A row an attempt, as an agent's log has them: OpenAI's messages with tool calls, the tool, a reward of 1 or 0."""
    return [
        {"task": name, "reward": float(kind == "right"), "messages": tool_messages(messages), "tools": [TOOL]}
        for kind, messages in sides
    ]


def tool_messages(messages):
    """A conversation with code in fences and outputs in user turns, rewritten with tool calls and results."""
    written = []
    for message in messages:
        code = re.fullmatch(r"(.*?)\n?```python\n(.*)\n```", message["content"], re.DOTALL)
        output = re.fullmatch(r"```output\n(.*)\n```", message["content"], re.DOTALL)
        if code:
            call = {"name": "python", "arguments": json.dumps({"code": code[2]})}
            calls = [{"id": f"call_{len(written)}", "type": "function", "function": call}]
            written.append({"role": "assistant", "content": code[1] or None, "tool_calls": calls})
        elif output:
            call_id = written[-1]["tool_calls"][0]["id"]
            written.append({"role": "tool", "tool_call_id": call_id, "content": output[1]})
        else:
            written.append(message)
    return written
