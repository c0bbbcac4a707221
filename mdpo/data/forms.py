"""Rows in publicly documented forms → rows with `prompt`, `chosen` and `rejected`. docs/rows.md is this
table in words; tests/unit/test_forms.py compares the two."""

from collections.abc import Iterable
from typing import Any

from mdpo.data.columns import HOLDS, SEQUENCES, Form, Row, is_recorded, role_of, structured, unwrapped
from mdpo.data.groups import AnswerPairs, rows_of_two
from mdpo.data.messages import normalize_messages, same_message
from mdpo.data.questions import QUESTIONS, begins, history, messages_in, question, text_in
from mdpo.data.sides import SIDE_FORMS, TRL, sides_form
from mdpo.data.tool_calls import read_tools
from mdpo.data.unread import NO_QUESTION, ROLE_MARKS, WORDS, Unread, no_pairs, no_question, words_in
from mdpo.errors import DropPair, UserError
from mdpo.types import SIDES, Message

FORMS = (*SIDE_FORMS, *QUESTIONS)
COLUMNS = ("prompt", "conversations", "system", "chosen", "rejected", "tools", "rejected_tools",
           "chat_template_kwargs", "margin", "score_chosen", "score_rejected", "weight", "key")  # fmt: skip
SYSTEMS = ("system", "system_prompt")
LOOKED_AT = 100  # rows of a dataset that tell its form
PromptRow = tuple[Row, set[str]]  # what becomes of `prompt`, and the columns that it comes from


def as_preference(row: Row, mask_turns: bool = True, sides: tuple | None = None) -> Row:
    """The row in COLUMNS, with `remarks` for the report and `used`, the names of the columns that it comes from.

    Where a prompt is given, or a side begins with a user turn, the row means what it means in TRL; else the question
    is looked for in the columns of `mdpo.data.questions`. With `mask_turns`, a row that contradicts itself, or that
    contains no question, is dropped. Sides that are recorded have their sequences in `recorded`, by name, and what
    else they have is not looked at; with `sides`, these take the place of the row's own. Raises DropPair.
    """
    row = {name: structured(value) for name, value in row.items()}
    form = sides_form(row)
    if form is None:
        raise DropPair(f"not a pair: its columns are {', '.join(sorted(set(row) - {'key'}))}"[:200])
    read = form.read(row) | (dict(zip(SIDES, sides, strict=True)) if sides else {})
    read |= {side: structured(read[side]) for side in SIDES}
    out: Row = {name: row[name] for name in COLUMNS if name in row} | {"remarks": []}
    if any(is_recorded(read[side]) for side in SIDES):
        return out | {"margin": _margin(row, read)} | _recorded(read) | {"used": _used(form) | _questions()}
    out |= _sides(read, row)
    out["margin"] = _margin(row, read)
    out |= _beside(row, out, SYSTEMS if mask_turns else SYSTEMS[:1])
    used = _used(form)
    if not (out["chosen"] and out["rejected"]):
        return {**out, "used": used}
    if read.get("prompt"):
        return {**out, "conversations": None, "used": used}
    sides = (out["chosen"], out["rejected"])
    prompt_row, columns = _prompt(row, sides, form is TRL, mask_turns)
    if prompt_row is None:
        prompt_row = _without_question(row, sides, used | columns, mask_turns)
    return {**out, **prompt_row, "used": used | columns}


def _used(form: Form) -> set[str]:
    return {*COLUMNS, *SYSTEMS, *form.columns, *form.also}


def _margin(row: Row, read: Row) -> Any:
    return read.get("margin") if row.get("margin") is None else row["margin"]


def _recorded(read: Row) -> Row:
    """The sequences of recorded sides, and of each side its messages as the row has them, or None."""
    out: Row = {"recorded": {side: read[side][SEQUENCES] for side in SIDES if is_recorded(read[side])}}
    for side in SIDES:
        others = read[side]
        if side in out["recorded"]:
            others = {name: value for name, value in others.items() if name != SEQUENCES}
            others = others if any(others.get(name) for name in HOLDS) else None
        out[side] = others
    return out


def _questions() -> set[str]:
    return {column for form in QUESTIONS for column in (*form.columns, *form.also)}


def _sides(read: Row, row: Row) -> Row:
    """The sides without an object around them; the tools of chosen, which are its own or the row's, and those of
    rejected where they are other ones, [] for none."""
    (chosen, a), (rejected, b) = (unwrapped(read[side]) for side in SIDES)
    given, other = row.get("tools"), row.get("rejected_tools")
    _refuse_other_tools(given, a, "the sides")
    _refuse_other_tools(other, b, "the sides", "rejected_tools")
    without = [] if a and b == [] else given  # an empty list beside the other side's tools says that there were none
    a, b = a or given, b or (without if other in (None, "") else other)
    tools = {"tools": a, "rejected_tools": None if a == b else b or []}
    return {**read, "chosen": chosen, "rejected": rejected, **tools}


def _beside(row: Row, out: Row, systems: tuple[str, ...]) -> Row:
    """`system` under either name, and the tools of an `input` object."""
    texts = [row[name] for name in systems if _says(row.get(name))]
    if len(texts) > 1 and texts[0] != texts[1]:
        raise DropPair("both system and system_prompt, which differ")
    input_tools = row["input"].get("tools") if isinstance(row.get("input"), dict) else None
    _refuse_other_tools(out.get("tools"), input_tools, "input")
    return {"system": texts[0] if texts else None, "tools": out.get("tools") or input_tools}


def _refuse_other_tools(own: Any, inside: Any, where: str, name: str = "tools") -> None:
    if own and inside and own != inside and (tools := read_tools(own)) and tools != read_tools(inside):
        raise DropPair(f"both {name} and tools in {where}, which differ")


def _prompt(row: Row, sides: tuple, of_trl: bool, mask_turns: bool) -> tuple[Row | None, set[str]]:
    """As PromptRow; None where there is no question."""
    prompt = next((row[name] for name in ("prompt", "conversations") if _says(row.get(name))), None)
    texts = all(isinstance(side, str) for side in sides)
    if any(map(_opens_with_user, sides)):
        return _with_history(row, [], sides) if mask_turns and prompt is None else ({}, set())
    if of_trl and prompt is not None:
        if not mask_turns:
            return {}, set()
        if not isinstance(prompt, str):
            return _with_history(row, messages_in(prompt), sides)
        if texts and not {*SYSTEMS, "history"} & set(row):
            _refuse_contradiction(row, prompt, sides[0])
            return {}, set()
    base, columns = question(row, sides[0])
    if not base or _ask_themselves(sides, base):
        return None, columns
    _refuse_unclear(base, columns - {"prompt", "conversations"}, sides)
    return {"prompt": base, "conversations": None}, columns


def _says(value: Any) -> bool:
    """Whether a prompt or a system text is one: neither null nor blank nor empty."""
    return value not in (None, [], {}) and not (isinstance(value, str) and not value.strip())


def _refuse_unclear(base: list[Message], columns: set[str], sides: tuple) -> None:
    """Refuses question columns beside sides that do not answer them. Raises DropPair."""
    names, last = ", ".join(sorted(columns)), base[-1]
    if not columns:
        return
    first = [side[0] if isinstance(side, list) else side for side in sides]
    if role_of(last) == "assistant" and all(isinstance(f, str) or role_of(f) == "assistant" for f in first):
        raise DropPair(f"{names} ends with an assistant turn that is not the chosen answer", names)
    if not all(isinstance(side, str) for side in sides):
        return
    words = text_in(last.get("content", last.get("value"))).strip()
    if words_in(words) >= WORDS and all(side.strip().startswith(words) for side in sides):
        reason = f"plain texts that begin with the words of {names}: take them out of the texts, or the column"
        raise DropPair(reason, "plain texts")
    if any(ROLE_MARKS.match(side.lstrip()) for side in sides):
        reason = f"plain texts with turns of their own beside {names}: take the column out, or write messages"
        raise DropPair(reason, "plain texts")


def _with_history(row: Row, base: list[Message], sides: tuple) -> PromptRow:
    """Turns in `history` or `context` before a prompt, or before sides that are complete from their user turn on."""
    name = "history" if history(row) else "context"
    before = history(row) or messages_in(row.get("context"))
    start = base or (sides[0] if isinstance(sides[0], list) else [])
    if not before or not start or begins(start, before) or begins(before, start[: _answer(start)]):
        return {}, set()
    if role_of(before[-1]) != "assistant" or role_of(start[0]) != "user":
        raise DropPair(f"{name} is not what the prompt or the sides begin with: write the whole conversation")
    return {"prompt": before + base, "conversations": None}, {name}


def _answer(messages: list[Message]) -> int:
    return next((i for i, m in enumerate(messages) if role_of(m) == "assistant"), len(messages))


def _refuse_contradiction(row: Row, prompt: str, answer: str) -> None:
    """Refuses plain texts beside a conversation with other words in `messages`, `trajectory` or `context`."""
    for name in ("messages", "trajectory", "context"):
        turns = [m for m in messages_in(row.get(name)) if role_of(m) != "system"]
        texts = [text_in(m.get("content", m.get("value"))).strip() for m in turns]
        if turns and texts not in ([prompt.strip()], [prompt.strip(), answer.strip()]):
            raise DropPair(f"both prompt and {name}, which differ: keep one")


def _without_question(row: Row, sides: tuple, used: set[str], mask_turns: bool) -> Row:
    """Where no column contains a question: as TRL takes such rows, counted where `mask_turns` is off, else dropped
    where the sides contain none either."""
    why = no_question(row, sides, used)
    if why is not None and mask_turns:
        raise why
    empty = all(isinstance(side, str) for side in sides) and "prompt" in row and not _says(row["prompt"])
    return {"remarks": [NO_QUESTION] if why is not None else ["an empty prompt"] if empty else []}


def _opens_with_user(side: Any) -> bool:
    first = next((m for m in side if role_of(m) != "system"), None) if isinstance(side, list) else None
    return role_of(first) == "user"


def _ask_themselves(sides: tuple, base: list[Message]) -> bool:
    """Whether conversations that open with the assistant's greeting contain the question that is beside them."""
    asked = [m for m in normalize_messages(base) if m["role"] == "user"]
    if not asked or not all(isinstance(side, list) for side in sides):
        return False
    both = [[m for m in normalize_messages(side) if m["role"] == "user"] for side in sides]
    return all(turns and same_message(turns[0], asked[0]) for turns in both)


def refuse_no_pairs(columns: Iterable[str], name: str) -> None:
    """Raises UserError where the columns of a dataset are those of no form."""
    columns = [column for column in columns if column != "key"]
    if sides_form(columns) is None:
        raise UserError(f"dataset {name}: {no_pairs(columns, name)}")


def look(rows: Iterable[Row], name: str, mask_turns: bool = True) -> tuple[set[str], bool]:
    """Of the first rows of a dataset: (the columns that are read, whether any row is a conversation). Raises UserError
    where in most of them the question may be in a column that nothing reads."""
    used, talks, unread, seen, formed = set(COLUMNS), False, [], 0, False
    for seen, row in enumerate(rows, 1):
        preference, formed = row, formed or sides_form(row) is not None
        try:
            preference = as_preference(rows_of_two(row, AnswerPairs())[0][0], mask_turns)
            used |= preference["used"]
        except Unread as reason:
            unread.append(str(reason))
        except DropPair:
            pass
        if len(preference.get("recorded", ())) < len(SIDES):  # else no template is needed
            talks |= any(isinstance(preference.get(name), list | dict) for name in COLUMNS[:5])
        if seen == LOOKED_AT:
            break
    if seen and not formed:
        refuse_no_pairs(row, name)
    if len(unread) > seen / 2:
        raise UserError(f"dataset {name}: {max(unread, key=unread.count)}.")
    return used, talks
