"""Turns of servers that speak no token ids: `/v1/chat/completions`, messages and tools in, a message out. What is
trained on is then the text, tokenized again: where a server can return ids, `server.py` is the better one."""

import json
from dataclasses import dataclass, field
from typing import Any

from mdpo.console import say
from mdpo.data.tool_calls import linked
from mdpo.rollouts.episode import Sampled
from mdpo.rollouts.server import BadAnswer, Server, only_choice
from mdpo.types import Message

THOUGHTS = ("reasoning_content", "reasoning")  # vLLM has had either


@dataclass
class Chat(Server):
    """Its `stops` and `vocabulary` are of no use here: the server ends turns and decodes them. At its end it says where
    the server has never sampled, at a temperature: then all samples of a task are the same."""

    template_kwargs: dict[str, Any] = field(default_factory=dict)  # as vLLM and SGLang take them
    answers: dict[int, list[int]] = field(default_factory=dict)  # of a prompt, both by their hashes

    def __exit__(self, *rest) -> None:
        super().__exit__(*rest)
        several = [given for given in self.answers.values() if len(given) > 1]
        if self.temperature and several and all(len(set(given)) == 1 for given in several):
            say(
                f"backend chat: {len(several)} prompts got the same answer each time, at temperature "
                f"{self.temperature:g}: the server takes the likeliest token (transformers serve does where "
                "generation_config.json has no do_sample)."
            )

    async def answer(self, messages: list[Message], tools: list[dict] | None, max_new_tokens: int) -> Sampled:
        """The assistant's next message. Beside temperature and top_p the server's own sampling holds: many refuse what
        OpenAI's protocol does not have."""
        body = {
            "model": self.model,
            "messages": [as_sent(message) for message in linked(messages, strict=True)],
            "max_tokens": max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            **({"tools": tools} if tools else {}),
            **({"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}),
        }
        sampled = await self._tried("/chat/completions", body, read_message)
        self.answers.setdefault(hash(json.dumps(body["messages"])), []).append(hash(json.dumps(sampled.message)))
        return sampled


def as_sent(message: Message) -> Message:
    """With the arguments of calls as JSON text, as the protocol has them."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


def read_message(answer: Any) -> Sampled:
    """A turn from an answer of /v1/chat/completions, its calls as the server gave them. Raises BadAnswer."""
    choice = only_choice(answer)
    message, reason = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict):
        raise BadAnswer("the choice has no message")
    if reason not in ("stop", "length", "tool_calls"):
        raise BadAnswer(f"finish_reason {reason!r:.40}")
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str | None) or not isinstance(calls, list | None):
        raise BadAnswer("the message's content is no text, or its tool_calls no list")
    thoughts = next((message[name] for name in THOUGHTS if isinstance(message.get(name), str) and message[name]), "")
    turn: Message = {"role": "assistant", "content": content or ""}
    turn |= {"reasoning_content": thoughts} if thoughts else {}
    turn |= {"tool_calls": calls} if calls else {}
    return Sampled([], cut=reason == "length", message=turn)
