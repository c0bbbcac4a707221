"""The columns that contain the question of a pair whose sides are answers alone: documented ones, as a table."""

from typing import Any

from mdpo.data.columns import Form, Row, role_of, structured
from mdpo.data.messages import normalize_messages, same_message
from mdpo.errors import DropPair
from mdpo.types import Message


def messages_in(value: Any) -> list[Message]:
    """A list of messages, one message, an object with `messages`, or any of these as JSON text; [] for all else."""
    value = structured(value)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    value = [value] if isinstance(value, dict) and role_of(value) else value
    return value if isinstance(value, list) and value and all(map(role_of, value)) else []


def rounds_in(value: Any) -> list[Message]:
    """Pairs of [question, answer], as LLaMA-Factory and ms-swift write a history."""
    rounds = isinstance(value, list) and all(isinstance(r, list | tuple) and len(r) == 2 for r in value)
    roles = ("user", "assistant")
    return (
        [{"role": r, "content": t} for turn in value for r, t in zip(roles, turn, strict=True) if t] if rounds else []
    )


def text_in(value: Any) -> str:
    """A text that says something; WebGPT's is an object with `full_text`."""
    value = value.get("full_text") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value.strip() else ""


def turns(name: str):
    return lambda row: messages_in(row.get(name))


def asked(name: str):
    def read(row: Row) -> list[Message]:
        text = "" if messages_in(row.get(name)) else text_in(row.get(name))
        return [{"role": "user", "content": text}] if text else []

    return read


def instruction(row: Row) -> list[Message]:
    texts = [text for name in ("instruction", "input") if (text := text_in(row.get(name)))]
    return [{"role": "user", "content": "\n".join(texts)}] if texts and text_in(row.get("instruction")) else []


def history(row: Row) -> list[Message]:
    return rounds_in(row.get("history")) or messages_in(row.get("history"))


def prompt_turns(row: Row) -> list[Message]:
    """Messages, or a text that HelpSteer2's marks split into turns: <extra_id_1>, the role, a line break. Raises
    DropPair."""
    if messages := messages_in(row.get("prompt")):
        return messages
    first, *others = text_in(row.get("prompt")).split("<extra_id_1>")
    parts = [("User", "", first), *(turn.partition("\n") for turn in others)]
    if any(role not in ("User", "Assistant") for role, _, _ in parts):
        raise DropPair("<extra_id_1> in prompt without User or Assistant behind it")
    return [{"role": role.lower(), "content": text.strip("\n")} for role, _, text in parts] if others else []


# In order: those that contain turns, then those that contain the user's next words. A user turn of the first kind
# that the second repeats is written once.
LISTS = (
    Form(("prompt",), "TRL; HelpSteer2 (`<extra_id_1>` parts a text into turns)", "messages, or one", prompt_turns),
    Form(("conversations",), "ShareGPT, LLaMA-Factory", "the prompt's messages", turns("conversations")),
    Form(("messages",), "LLaMA-Factory, axolotl", "the prompt's messages; an answer at its end that is the chosen one "
         "is left out", turns("messages")),
    Form(("trajectory",), "UltraInteract", "the prompt's messages", turns("trajectory")),
    Form(("context",), "HelpSteer3, NeMo-RL", "the prompt's messages", turns("context")),
    Form(("input",), "OpenAI, Azure, Fireworks, Together", "its `messages` are the prompt's, its `tools` the row's; or "
         "a list of messages", turns("input")),
    Form(("history",), "LLaMA-Factory, ms-swift", "lists of [question, answer], or messages, before the question",
         history),
)  # fmt: skip
TEXTS = (
    Form(("instruction",), "LLaMA-Factory, UltraFeedback, argilla", "the user's turn; `input` follows on a new line",
         instruction, ("input",)),
    Form(("question",), "Orca pairs, StackExchange, WebGPT (`full_text`)", "the user's turn", asked("question")),
    Form(("query",), "ms-swift", "the user's turn", asked("query")),
    Form(("input",), "distilabel, axolotl (chatml.icr)", "the user's turn", asked("input")),
    Form(("prompt",), "HelpSteer2, PKU-SafeRLHF, NeMo-RL", "the user's turn, unless the sides are `chosen` and "
         "`rejected`: then these are plain texts, as in TRL, if there is no `system`, `system_prompt` or `history`",
         lambda row: [] if prompt_turns(row) else asked("prompt")(row)),
    Form(("history",), "SHP", "a text is the user's turn", asked("history")),
)  # fmt: skip
QUESTIONS = (*LISTS, *TEXTS)


def question(row: Row, answer: Any = None) -> tuple[list[Message], set[str]]:
    """(messages before the answers, the columns that they come from); ([], nothing) where no column has any. `answer`
    is the chosen side, which `messages` may end with. Raises DropPair where columns say different things."""
    before, used = history(row), {"history"}
    before, used = (before, used) if before else ([], set())
    base, name = _one_list(row, answer)
    text, columns = _one_text(row)
    if before and base:
        if not begins(base, before):
            raise DropPair(f"both history and {name}, which differ: write the whole conversation as `prompt`")
        before = []
    base, used = before + base, used | {name} - {""}
    if not text:
        return base, used
    if base and any(same_message(m, text) for m in normalize_messages(base)):
        return base, used | columns
    if base and role_of(base[-1]) != "assistant" and any(role_of(m) != "system" for m in base):
        names = ", ".join(sorted(columns))
        raise DropPair(f"both {name or 'history'} and {names}, which differ: write the whole conversation as `prompt`")
    return [*base, text], used | columns


def _one_list(row: Row, answer: Any) -> tuple[list[Message], str]:
    """The messages of the columns of LISTS but history, which all say the same, and one of their names."""
    by_column: dict[str, list[Message]] = {}
    for form in LISTS[:-1]:
        if messages := form.read(row):
            by_column[form.columns[0]] = _without_answer(messages, answer)
    base, name = [], ""
    for other, messages in by_column.items():
        if base and not (len(base) == len(messages) and begins(base, messages)):
            raise DropPair(f"both {name} and {other}, which differ: keep one, or write `prompt`")
        base, name = base or messages, name or other
    return base, name


def _without_answer(messages: list[Message], answer: Any) -> list[Message]:
    """A conversation that ends with the chosen answer, as SFT data has it, up to there."""
    answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    answers = normalize_messages(answers if isinstance(answers, list) else [answers])
    start, end = messages[: -len(answers)], normalize_messages(messages)[-len(answers) :]
    if start and len(end) == len(answers) and role_of(end[0]) == "assistant" and all(map(same_message, end, answers)):
        return start
    return messages


def _one_text(row: Row) -> tuple[Message | None, set[str]]:
    by_column: dict[str, Message] = {}
    prompt = [form for form in TEXTS if form.columns == ("prompt",) and form.read(row)]  # the name that is meant for it
    for form in prompt or TEXTS:
        if form.columns[0] == "input" and "instruction" in by_column:
            continue
        for message in form.read(row)[-1:]:
            by_column[form.columns[0]] = message
    if by_column and not prompt and text_in(row.get("context")):
        both = f"both {' and '.join(by_column)} and context"
        raise DropPair(f"{both} hold text: write both into `prompt`", both)
    texts = {m["content"].strip() for m in by_column.values()}
    if len(texts) > 1:
        raise DropPair(f"both {' and '.join(by_column)}, which differ: keep one, or write `prompt`")
    columns = {column for form in TEXTS if form.columns[0] in by_column for column in (*form.columns, *form.also)}
    return next(iter(by_column.values()), None), columns & set(row)


def begins(messages: list[Message], start: list[Message]) -> bool:
    """Whether messages begin with the same words as `start`, which may be all of them."""
    if len(start) > len(messages):
        return False
    return all(map(same_message, normalize_messages(messages), normalize_messages(start)))
