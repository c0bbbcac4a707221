"""The day that a chat template writes into conversations (Llama 3, Mistral, gpt-oss ask for it with `strftime_now`):
one for a whole run. Otherwise a run resumed tomorrow would have other tokens than today.

The day is {"strftime_now": "2026-11-28"} among the template's variables: in a recipe's `chat_template_kwargs` where it
is fixed by the user, put there at a run's first start where it is not, and so in every checkpoint's manifest and in
recipe_resolved.yaml. Variables of the template's own (`date_string`) win over it, as the template wants it.
"""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import chat_template_utils

from mdpo.errors import UserError
from mdpo.ranks import agreed
from mdpo.storage import manifest

NAME = "strftime_now"
RESOLVED = "recipe_resolved.yaml"  # of an output folder, as mdpo.reporting.run_report has it
VARIABLE = re.compile(rf"set\s+(\w+)\s*=\s*{NAME}\(\s*(['\"])(.*?)\2\s*\)")
TWO_DAYS = ("2001-02-03", "2014-05-16")  # in nothing alike that a template may write of a day
TOOL = {"type": "function", "function": {"name": "f", "description": "g", "parameters": {"type": "object"}}}


def today() -> str:
    return datetime.now().date().isoformat()


class Clock:
    """Replaces `datetime`, of which transformers asks `now()`: always midnight of one day."""

    def __init__(self, day: str):
        """Raises UserError for what is no date."""
        try:
            self.day = datetime.fromisoformat(day)
        except ValueError:
            raise UserError(f"chat_template_kwargs: {NAME}: {day!r} is no date. Write it as 2026-11-28.") from None

    def now(self) -> datetime:
        return self.day


def rendered_on_day(tokenizer, messages, **kwargs) -> str:
    """apply_chat_template's text, in which `strftime_now` tells the day that is among the variables. Raises
    UserError for what is no date, and lets what the template raises pass."""
    day, before = kwargs.pop(NAME, None), chat_template_utils.datetime
    # A template is not given functions as variables: they come to it as text.
    clock = before if day is None else Clock(str(day))
    chat_template_utils.datetime = clock  # type: ignore[misc,assignment]  # a name of transformers' module
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    finally:
        chat_template_utils.datetime = before  # type: ignore[misc]


def with_day(tokenizer, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of a template's variables, with the day, today where they have none, if the template may ask for it.
    Raises UserError for a day that is no date."""
    kwargs = dict(kwargs or {})
    if NAME in kwargs:
        Clock(str(kwargs[NAME]))
    return {**kwargs, NAME: today()} if asks(tokenizer) and NAME not in kwargs else kwargs


def asks(tokenizer) -> bool:
    return NAME in str(tokenizer.chat_template or "")


def fix_day(recipe, tokenizer, checkpoint: str | Path | None = None) -> list[str]:
    """Puts the day into the recipe's chat_template_kwargs, if the template may ask for it and the recipe does not set
    one: that of the run that wrote `checkpoint`, else today. Returns lines about it where the day is written into
    conversations. All ranks call it together."""
    kwargs = recipe.data.chat_template_kwargs or {}
    if not asks(tokenizer) or NAME in kwargs:
        return []
    first_day = agreed(lambda: day_of(checkpoint)) if checkpoint else None
    day = first_day or agreed(today)
    recipe.data.chat_template_kwargs = recipe.values["chat_template_kwargs"] = {**kwargs, NAME: day}
    if not writes_day(tokenizer, kwargs):
        return []
    line = f"chat template: it writes the day into conversations, {day}, "
    if first_day:
        return [f"{line}the day of the first start, which {checkpoint} keeps."]
    line += f"today ({checkpoint} keeps none)" if checkpoint else "today; a resumed run keeps that of its start"
    return [f"{line}. The same tokens on any day: chat_template_kwargs: {{{_fixing(tokenizer, day)}}}."]


def day_of(folder: str | Path) -> str | None:
    """The day of the run that wrote a checkpoint or an output folder; None where it has none."""
    try:
        names = manifest(Path(folder))["run"].get("names", {})
    except ValueError:
        try:
            names = yaml.safe_load(Path(folder, RESOLVED).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
    day = (names.get("chat_template_kwargs") or {}).get(NAME)
    return None if day is None else str(day)


def writes_day(tokenizer, kwargs: dict[str, Any]) -> bool:
    """Whether small conversations, with and without system text and tools, come out otherwise on another day."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in (turns, [{"role": "system", "content": "c"}, *turns]):
        for tools in (None, [TOOL]):
            texts = {_text(tokenizer, messages, {**kwargs, "tools": tools, NAME: day}) for day in TWO_DAYS}
            if len(texts) > 1:
                return True
    return False


def _text(tokenizer, messages, kwargs) -> str:
    try:
        return rendered_on_day(tokenizer, messages, **kwargs)
    except Exception:  # a template refuses what it does not know, in its own words
        return ""


def _fixing(tokenizer, day: str) -> str:
    """The template's own variable for it where it has one, as other programs know that too."""
    text = str(tokenizer.chat_template)
    for name, _, form in VARIABLE.findall(text):
        if re.search(rf"\b{name}\s+is\s+(not\s+)?defined", text):
            return f'{name}: "{Clock(day).now().strftime(form)}"'
    return f'{NAME}: "{day}"'
