"""Trajectories that a tiny random model samples, turn by turn, in the syntax of a chat template, and what a server
would have recorded of them: the ids of each prompt and the ids sampled behind it.

The model chooses the words, among ordinary ones; the syntax around them and the token that ends a turn are prescribed.
Messages are read from the decoded text alone, as a client does.
"""

import random
import re
from dataclasses import dataclass

import torch
from conversations import TOOLS, assistant, tool, user
from tiny import tiny_llama
from transformers import LogitsProcessor, LogitsProcessorList

from mdpo.types import Message

HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "[answer]"}}\n</tool_call>'
THINK = "<think>\n[thought]\n</think>\n\n"
OPENED = "[thought]\n</think>\n\n"  # behind a generation prompt that ends with <think> and a line break
ANALYSIS = "<|channel|>analysis<|message|>[thought]<|end|><|start|>assistant"


@dataclass(frozen=True)
class Syntax:
    """How a turn is sampled. `answer` and `call` are texts with [thought] and [answer] where the model's words are;
    `field` is the message's field of thoughts, "" where they are in its content, as text behind `supplied`."""

    stop: str
    answer: str = "[answer]"
    call: str = ""
    call_stop: str = ""
    field: str = "reasoning_content"
    supplied: str = ""
    spaced: bool = False  # the first word is sampled with a space before it, which the template writes
    system: bool = False

    def message(self, text: str, called: bool) -> Message:
        """What a client makes of a turn's text."""
        form = self.call if called else self.answer
        pattern = re.sub(r"\\\[(thought|answer)\\\]", r"(?P<\1>.*?)", re.escape(form))
        parts = re.fullmatch(pattern, text.removeprefix(" " * self.spaced), re.DOTALL).groupdict()
        calls = [("get_weather", {"city": parts["answer"]})] if called else []
        if "thought" not in parts:
            return assistant("" if called else parts["answer"], *calls)
        if not self.field:
            return assistant(self.supplied + text)
        return assistant("" if called else parts["answer"], *calls, **{self.field: parts["thought"]})


LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "[answer]"}}'
GLM_CALL = "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>[answer]</arg_value>\n</tool_call>"
GPT_CALL = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "[answer]"}'
XML_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\n[answer]\n</parameter>\n</function>\n</tool_call>"
LINEAR = {
    "qwen2_5": Syntax("<|im_end|>", call=HERMES),
    "llama3_1": Syntax("<|eot_id|>", call=LLAMA_CALL),
    "gemma": Syntax("<end_of_turn>"),
    "phi3": Syntax("<|end|>"),
    "cohere": Syntax("<|END_OF_TURN_TOKEN|>"),
}
THINKING = {
    "qwen3": Syntax("<|im_end|>", THINK + "[answer]", THINK + HERMES),
    "qwen3_5_think": Syntax("<|im_end|>", OPENED + "[answer]", OPENED + XML_CALL),
    "glm4moe": Syntax(
        "<|user|>", "\n<think>[thought]</think>\n[answer]", "\n<think>[thought]</think>" + GLM_CALL, "<|observation|>"
    ),
    "gptoss": Syntax(
        "<|return|>", ANALYSIS + "<|channel|>final<|message|>[answer]", ANALYSIS + GPT_CALL, "<|call|>", "thinking"
    ),
    "deepseekv3": Syntax("<｜end▁of▁sentence｜>", OPENED + "[answer]", field="", supplied="<think>\n"),
    "deepseek_r1_distill": Syntax("<｜end▁of▁sentence｜>", OPENED + "[answer]", field=""),
    "lfm2_2_5": Syntax("<|im_end|>", "<think>[thought]</think>[answer]"),
    "nemotron_3_nano": Syntax("<|im_end|>", "[thought]\n</think>\n[answer]"),
}


class Prescribed(LogitsProcessor):
    """At step t of generation only the ids `plan[t]` may be sampled."""

    def __init__(self, plan: list[list[int]], n_prompt: int):
        self.plan, self.n_prompt = plan, n_prompt

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        ids = self.plan[input_ids.size(1) - self.n_prompt]
        allowed[:, ids] = scores[:, ids]
        return allowed


@dataclass
class Recorded:
    """A trajectory: its messages, and of each turn (ids of the prompt, ids sampled)."""

    messages: list[Message]
    turns: list[tuple[list[int], list[int]]]
    tools: list | None


class Sampler:
    """A random model that talks in the syntax of a template; `render(messages, tools)` is the text of a prompt."""

    def __init__(self, tokenizer, syntax: Syntax, seed: int = 0):
        self.tokenizer, self.syntax, self.random = tokenizer, syntax, random.Random(seed)
        self.model = tiny_llama(tokenizer, seed, layers=1, hidden_size=16)
        words = {i: token for token, i in tokenizer.get_vocab().items()}
        first = "[Ġ▁][A-Z][a-z]+" if syntax.spaced else "It|Let|Python|What"
        self.first = [i for i, w in words.items() if re.fullmatch(first, w)]
        # To a Metaspace tokenizer a line break and an S are one token.
        self.opening = [i for i, w in words.items() if re.fullmatch(first if syntax.spaced else f"{first}|Search", w)]
        self.later = [i for i, w in words.items() if re.fullmatch("[Ġ▁][A-Za-z]{3,}|ort|er", w)]
        torch.manual_seed(seed)

    def trajectory(self, agent: bool) -> Recorded:
        """Three questions with answers; of an agent a call, its output, an answer, another question and answer."""
        system = [{"role": "system", "content": "Be brief."}] * self.syntax.system
        roles = ["call", "tool", "answer", "user", "answer"] if agent else ["answer", *["user", "answer"] * 2]
        messages, turns = [*system, user("What is 3 * 4?")], []
        tools = TOOLS if agent else None
        for k, role in enumerate(roles):
            if role == "user":
                messages.append(user(f"And {k} * 4?"))
            elif role == "tool":
                messages.append(tool("It is sunny in Paris."))
            else:
                prompt = self.prompt(messages, tools)
                sampled = self.sample(prompt, role == "call")
                turns.append((prompt, sampled))
                messages.append(self.syntax.message(self.text(sampled[:-1]), role == "call"))
        return Recorded(messages, turns, tools)

    def prompt(self, messages, tools) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        return self.ids(text)

    def sample(self, prompt: list[int], called: bool) -> list[int]:
        stop = (self.syntax.call_stop if called else "") or self.syntax.stop
        plan = [*self.plan(self.syntax.call if called else self.syntax.answer), self.ids(stop)]
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=True,
            max_new_tokens=len(plan) + 5,
            eos_token_id=self.ids(stop),
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([Prescribed(plan, len(prompt))]),
        )
        return out[0, len(prompt) :].tolist()

    def plan(self, form: str) -> list[list[int]]:
        """Of each step the ids that may be sampled. Syntax has the tokens that it has between words."""
        plan = []
        for piece in re.split(r"(\[thought\]|\[answer\])", form):
            if piece in ("[thought]", "[answer]"):
                plan += [self.first if plan else self.opening, *[self.later] * self.random.randint(1, 5)]
            elif piece:
                before = ["It"] * bool(plan)
                around, left, right = "".join([*before, piece, "It"]), len(before), 1
                plan += [[i] for i in self.ids(around)[left:-right]]
        return plan

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def merged(turns: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of sequences: a turn goes on with the one before it as long as its prompt begins with all of that.

    Example: [([1], [2]), ([1, 2, 3], [4]), ([1, 3], [5])] -> ([1, 2, 3, 4], [0, 1, 0, 1]) and ([1, 3, 5], [0, 0, 1]).
    """
    sequences = []
    for prompt, sampled in turns:
        ids, mask = sequences[-1] if sequences else ([], [])
        if sequences and prompt[: len(ids)] == ids:
            sequences.pop()
        else:
            ids, mask = [], []
        mask = [*mask, *[0] * (len(prompt) - len(ids)), *[1] * len(sampled)]
        sequences.append(([*prompt, *sampled], mask))
    return sequences
