"""What a policy is asked: the rows of a file, each the messages before its first turn and columns for the environment
and the reward functions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpo.data.files import json_rows
from mdpo.data.messages import conversation, normalize_messages
from mdpo.errors import DropPair, UserError
from mdpo.types import Message


@dataclass(frozen=True)
class Task:
    """`row` has the file's columns as they are: an environment's `reset` gets them, and reward functions do."""

    key: str
    row: dict[str, Any]
    messages: list[Message]


def read_tasks(
    path: str, instruction: str = "", needs: dict[str, Callable[[Any], Any]] | None = None, own_prompts: bool = False
) -> list[Task]:
    """The rows of a JSON file: `question` (a text) or `prompt` (a text or messages), and the columns in `needs`, each
    with what raises UserError for a bad value. `instruction` goes in front of texts, with an empty line between. With
    `own_prompts` a row may have neither: the environment's `reset` says what is asked. Raises UserError with the row's
    place."""
    if not Path(path).is_file():
        raise UserError(f"rollouts: there is no file {path}.")
    tasks, keys = list[Task](), set()
    for place, row in json_rows(path):
        where = f"{path}:{place}"
        asked = [name for name in ("question", "prompt") if row.get(name)]
        if not (needs or {}).keys() <= row.keys() or len(asked) > 1 or not (asked or own_prompts):
            wanted = "`question` or `prompt`" + "".join(f", and `{name}`" for name in needs or ())
            raise UserError(f"{where}: needs {wanted}; it has {', '.join(row)}.", "question")
        key = str(row.get("key") or row.get("id") or where)
        if key in keys:
            raise UserError(f"{where}: the key {key!r} comes twice.", "key")
        keys.add(key)
        try:
            for name, check in (needs or {}).items():
                check(row[name])
            messages = _prompt(row[asked[0]], instruction) if asked else [{"role": "user", "content": instruction}]
        except (DropPair, UserError) as error:
            raise UserError(f"{where}: {error}", error.key) from error
        tasks.append(Task(key, row, messages))
    if not tasks:
        raise UserError(f"rollouts: no rows in {path}.")
    return tasks


def _prompt(asked: Any, instruction: str) -> list[Message]:
    asked = conversation(asked)
    if isinstance(asked, str):
        return [{"role": "user", "content": f"{instruction}\n\n{asked}" if instruction else asked}]
    if instruction:
        raise UserError("--instruction goes in front of texts; this prompt is a list of messages.")
    messages = normalize_messages(asked) if isinstance(asked, list) else []
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError("a prompt has to be a text, or messages of which the last is not the assistant's.")
    return messages


def observed(messages: list[Message], observation: Any) -> list[Message]:
    """The prompt with what `reset` returned behind its last message, as TRL appends it. Raises TypeError where that is
    neither a text nor None."""
    if observation is None:
        return list(messages)
    if not isinstance(observation, str):
        raise TypeError(f"reset returned {type(observation).__name__}, neither a text nor None")
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last.get('content') or ''}{observation}"}]
