"""Generated conversations, and what each of their turns has to be by the tables of the mask tests.

They contain tool calls, thoughts, and text that breaks naive masks: markers of the template itself, exchanges played
inside a message, combining and right-to-left characters, emoji, nothing at all, white space at both edges.
"""

import unicodedata
from collections import Counter
from functools import cache

from conversations import EXCLUDED, TOOLS, assistant, tool, user
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mask_checks import byte_level_tokens, byte_ranges
from segments import SETTINGS, as_stop, assistant_text, in_one, native, plain_turns, turns_alone
from templates import ROWS
from tokenizers import normalizers

from mdpo.errors import DropPair
from mdpo.masking.loss_mask import tokenize_pair
from mdpo.masking.sentinels import LEFT_OUT, NOT_DERIVABLE
from mdpo.masking.sequences import NO_STOP
from mdpo.masking.spans import STRADDLE
from mdpo.types import SIDES, Pair, sequence_lengths, split, turn_begins

KEYS = {LEFT_OUT, "template refuses the conversation", NOT_DERIVABLE, NO_STOP, STRADDLE, "a turn without words"}
KEYS |= {"chosen equals rejected", "diverges only in user or tool text", "no assistant turn"}
WORDS = [
    "Twelve.", "e\u0301te\u0301", "\u0301", "שלום, עולם", "\u202eabc\u202c", "مرحبا", "👩\u200d👩\u200d👧", "日本",
    "🙂", "a\u200d", "\u00a0", "\u2028", "\x1c", " ", "\n", "\n\n", "\t", "\r\n", "```python\nprint(3 * 4)\n```",
    "{{ messages }}", "{% raw %}", "\\boxed{12}", "\\", '"', "'", "Qz0x0a", "Qz1x1b", "/nothink", "&lt;", "0", "No.",
    "user", "assistant\n",
]  # fmt: skip
FOREIGN = [
    "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n<|im_start|>user\n", "<|eot_id|>", "</s>", "<eos>", "<bos>",
    "[/INST]", "<end_of_turn>\n<start_of_turn>model\n", "<|end|><|start|>assistant", "<tool_response>\n12",
    "</tool_call>", "<|user|>", "<|assistant|>", "<｜Assistant｜>",
]  # fmt: skip
THOUGHTS = ("qwen3", "qwen3_5_think", "glm4moe", "gptoss", "lfm2_2_5")  # templates that write reasoning_content


# ---- conversations


def knows(name: str, conversation: str) -> bool:
    """Whether a template can write a conversation of the mask tests."""
    return name not in EXCLUDED.get(conversation, ())


@cache
def texts(name: str):
    """Any text, most of it awkward. U+2581 is a space to Metaspace tokenizers, and decodes to one."""
    row = ROWS[name]
    own = [row.header, as_stop(name), row.user[0], as_stop(name) + row.after + row.user[0], row.lead, row.block]
    free = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=6)
    pieces = st.one_of(st.sampled_from(WORDS), st.sampled_from([*filter(None, own), *FOREIGN]), free)
    return st.lists(pieces, max_size=5).map("".join)


@st.composite
def spoken(draw, name: str):
    """An assistant's content: text, and sometimes none. Reasoning has a field of its own here."""
    text = draw(texts(name)).replace("think>", "thinks>")
    return text if draw(st.integers(0, 9)) == 9 else f"{text}It is so.{text}"


def arguments(name: str):
    values = st.one_of(texts(name), st.integers(-9, 99), st.booleans(), st.lists(st.integers(0, 9), max_size=2))
    return st.dictionaries(st.sampled_from(["city", "code", "days"]), values, max_size=2)


def calls(name: str):
    one = st.tuples(st.sampled_from(["get_weather", "get_time"]), arguments(name))
    return st.lists(one, min_size=1, max_size=2 if knows(name, "two calls") else 1)


@st.composite
def turns(draw, name: str, tools: bool = True):
    """An assistant's turn: an answer, or with `tools` also calls with their outputs and what follows them."""
    messages = []
    if tools and ROWS[name].tools and ROWS[name].tools.call and draw(st.booleans()):
        content = draw(spoken(name)).strip() if knows(name, "call with text") and draw(st.booleans()) else ""
        tool_calls = draw(calls(name))
        messages = [assistant(content, *tool_calls), *(tool(draw(texts(name)), function) for function, _ in tool_calls)]
        messages[0] |= draw(reasoning(name, content))
    elif tools and knows(name, "tool text") and draw(st.integers(0, 4)) == 0:
        messages = [assistant(draw(spoken(name))), tool(draw(texts(name)), "python")]
    return [*messages, assistant(draw(spoken(name))) | draw(reasoning(name))]


def reasoning(name: str, content: str = ""):
    thought = st.one_of(st.just("Tea.\n"), spoken(name).map(lambda text: f"{text}Hm.{text}"))
    none = st.just({})
    return none if name not in THOUGHTS else st.one_of(none, st.builds(dict, reasoning_content=thought))


@st.composite
def pairs(draw, name: str):
    """Two sides that continue one prompt; chosen may have several turns."""
    question = texts(name).filter(lambda text: not text.strip().startswith("<tool_response>"))
    prompt = [user(draw(question))]
    if knows(name, "hostile system") and draw(st.booleans()):
        prompt = [{"role": "system", "content": draw(texts(name))}, *prompt]
    chosen = [*prompt, *draw(turns(name))]
    for _ in range(draw(st.integers(0, 2))):
        # DeepSeek-V3 opens the outputs of a conversation once, which its table cannot say.
        tools = knows(name, "call, 4 turns") or not any(m["role"] == "tool" for m in chosen)
        chosen += [user(draw(question)), *draw(turns(name, tools))]
    rejected = [*prompt, *draw(turns(name))]
    used = any("tool_calls" in m for m in chosen + rejected)
    return Pair(chosen, rejected, len(prompt), tools=TOOLS if used else None)


# ---- what each turn has to be


def thinking(name: str, messages, i: int) -> tuple[str, str] | None:
    """(supplied, sampled) of a turn with reasoning, where its template writes that; read from the templates."""
    message, row = messages[i], ROWS[name]
    last_user = max(k for k, m in enumerate(messages) if m["role"] == "user")
    if not (thought := message.get("reasoning_content")) or i < last_user:
        return None  # thoughts before the last question are history, and left out
    following = messages[i + 1]["role"] if i + 1 < len(messages) else None
    content, called = message["content"], bool(message.get("tool_calls"))
    plain, *_ = assistant_text(row, {**message, "content": row.clean(content, True)}, following)
    if name == "qwen3":
        return "", f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{plain}"
    if name == "qwen3_5_think":
        return "<think>\n", f"{thought.strip()}\n</think>\n\n{plain}"
    if name == "glm4moe":
        return "", f"\n<think>{thought.strip()}</think>{plain if content.strip() or called else ''}"
    if name == "lfm2_2_5":
        return "", f"<think>{thought}</think>{plain}"
    answered = any(m["role"] == "assistant" and not m.get("tool_calls") for m in messages[i + 1 :])
    if called and answered:  # gpt-oss writes none beside calls that an answer follows
        return None
    return "", f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{plain}"


def thoughts_by_turn(name: str, messages) -> list[tuple[str, str] | None]:
    """`thinking` of each assistant message as the last one."""
    return [thinking(name, messages[: i + 1], i) for i, m in enumerate(messages) if m["role"] == "assistant"]


def whole_segments(name: str, messages, alone, render):
    """The segments of the whole text where it holds each turn as it was sampled, else None. What gpt-oss has beside
    calls is not in it once an answer follows."""
    if name == "gptoss" and any(m.get("tool_calls") and m["content"] for m in messages):
        return None
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    kept = [thinking(name, messages, i) for i in assistants]
    if any(k is None and t for k, t in zip(kept, thoughts_by_turn(name, messages), strict=True)):
        return None
    bare = [m for m in messages if m["role"] != "system"]
    return in_one(ROWS[name], messages, render(messages), alone, render, plain_turns(ROWS[name], bare, kept))


def ours(name: str, template, pair: Pair):
    """Of both sides the (ids, mask) of each sequence."""
    got = vars(tokenize_pair(pair, template, SETTINGS))
    parts = [[split(got[f"{s}_{x}"], sequence_lengths(got, s)) for x in ("ids", "mask")] for s in SIDES]
    return [list(zip(*part, strict=True)) for part in parts]


def normal(tokenizer, text: str) -> str:
    """A text as the tokenizer reads it: Qwen's compose characters first."""
    composes = isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.NFC)
    return unicodedata.normalize("NFC", text) if composes else text


def holds(name: str, template, pair: Pair, make_masks=ours) -> bool:
    """The property of one pair; `template` is a ChatTemplate of the named one. False where a character is composed over
    a turn's edge, which belongs to neither side. Raises DropPair where the pair is dropped."""
    tokenizer, row = template.tokenizer, ROWS[name]
    sides = make_masks(name, template, pair)

    def render(messages, **more):
        return tokenizer.apply_chat_template(native(name, messages), tools=pair.tools, tokenize=False, **more)

    for messages, sequences in zip((pair.chosen, pair.rejected), sides, strict=True):
        alone = turns_alone(row, messages, render, thoughts_by_turn(name, messages))
        segments = whole_segments(name, messages, alone, render)
        done, before = 0, None
        for ids, mask in sequences:
            turns = int(turn_begins(mask).sum())
            expected = segments if segments and turns == len(alone) else joined(alone[done : done + turns])
            if before:  # no sequence begins but where it has to
                context = tokenizer(alone[done][0], add_special_tokens=False)["input_ids"]
                assert context[: len(before)] != before
            done, before = done + turns, ids
            if not matches(tokenizer, ids, mask, expected):
                return False
        assert done == len(alone)
    return True


def joined(turns) -> list[tuple[str, bool]]:
    """The segments of turns of which one is what the next one's context begins with."""
    segments: list[tuple[str, bool]] = []
    for context, sampled in turns:
        before = "".join(part for part, _ in segments)
        assert context.startswith(before)
        segments += [(context[len(before) :], False), (sampled, True)]
    return segments


def matches(tokenizer, ids, mask, segments) -> bool:
    """Asserts that the supervised tokens are those of the segments' supervised text. False where a character is
    composed over an edge."""
    plain = "".join(part for part, _ in segments)
    segments = [(normal(tokenizer, part), flag) for part, flag in segments]
    if "".join(part for part, _ in segments) != normal(tokenizer, plain):
        return False
    *_, last = (k for k, (_, supervised) in enumerate(segments) if supervised)
    if not mask or mask[-1]:  # what is behind the last turn is left out where turns are made one by one
        segments = segments[: last + 1]
    text = "".join(part for part, _ in segments)
    flags = b"".join(bytes([flag]) * len(part.encode()) for part, flag in segments)
    for (start, end), supervised in zip(byte_ranges(tokenizer, ids, text), mask, strict=True):
        assert flags[start:end] == bytes([supervised]) * (end - start)
    supervised_text = "".join(part for part, supervised in segments if supervised)
    if byte_level_tokens(tokenizer):  # a Metaspace decoder drops a space at the start
        assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == supervised_text
    return True


def features(pair: Pair) -> set[str]:
    messages = [*pair.chosen, *pair.rejected]
    contents = [m["content"] for m in messages]
    return {
        *({"call"} if pair.tools else ()),
        *({"thought"} if any("reasoning_content" in m for m in messages) else ()),
        *({"several turns"} if sum(m["role"] == "user" for m in pair.chosen) > 1 else ()),
        *({"white space at an edge"} if any(text != text.strip() for text in contents) else ()),
        *({"nothing"} if "" in contents else ()),
        *({"markers"} if any(marker in text for text in contents for marker in ("<|", "</", "<｜")) else ()),
        *({"no ASCII"} if any(not text.isascii() for text in contents) else ()),
    }


def run(name: str, template, n: int, make_masks=ours, phases=tuple(Phase)) -> Counter:
    """Tries the property on `n` pairs, the same ones each time; counts what was kept, its features, and why the rest
    was not."""
    counts = Counter()

    @settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(pairs(name))
    def each(pair):
        try:
            same = holds(name, template, pair, make_masks)
        except DropPair as reason:
            assert reason.key in KEYS
            counts[reason.key] += 1
        else:
            counts.update({"kept", *features(pair)} if same else {"composed over an edge"})

    each()
    return counts


def check_many(name: str, template, n: int) -> None:
    """The property on `n` pairs, of which half and each of their features have to be kept."""
    counts = run(name, template, n)
    expected = {"several turns", "white space at an edge", "nothing", "markers", "no ASCII"}
    expected |= {"call"} if ROWS[name].tools and ROWS[name].tools.call else set()
    expected |= {"thought"} if name in THOUGHTS else set()
    assert counts["kept"] >= n // 2, counts
    assert {feature for feature in expected if counts[feature] < n // 20} == set(), counts
