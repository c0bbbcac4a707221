"""A row with several answers to one prompt → a row for each two of them that are compared."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mdpo.data.columns import HOLDS, Row, is_recorded, role_of, structured
from mdpo.data.sides import FEWER, TRL, sides_form
from mdpo.errors import DropPair
from mdpo.types import SIDES

SEVERAL = "two of several answers"  # the remark on pairs that such rows make
TIE = "a tie: no two answers of the row differ in reward"


@dataclass(frozen=True)
class AnswerPairs:
    """Which answers are compared: the first of the best with the first of the worst; all that differ, the widest gap
    first; each distinct reward with the next lower one; or some at random, the same ones in each run. `min_reward_gap`
    is in units of reward. Sides that are lists of conversations have no rewards: each chosen one is compared with each
    rejected one, or with `random` some of these."""

    pairs: str = "best_worst"  # best_worst | all | adjacent | random
    min_reward_gap: float = 0.0
    max_pairs_per_prompt: int | None = None  # None: all of them, at random one

    def first(self, pairs: list[tuple[int, int]], seed: str) -> list[tuple[int, int]]:
        """As many as are wanted."""
        limit = self.max_pairs_per_prompt
        if self.pairs == "random":
            pairs, limit = random.Random(seed).sample(pairs, len(pairs)), limit or 1
        return pairs[:limit]

    def of_rewards(self, rewards: list[float | None], seed: str) -> list[tuple[int, int]]:
        """(better, worse), indices of answers; one without a reward is compared with none.

        Example: [1.0, 0.0, 0.5, 0.0] -> best_worst (0, 1); all (0, 1) (0, 3) (0, 2) (2, 1) (2, 3); adjacent (0, 2)
        (2, 1)."""
        known = [(reward, i) for i, reward in enumerate(rewards) if reward is not None]
        gaps = {(i, j): a - b for a, i in known for b, j in known if a > b and a - b >= self.min_reward_gap}
        firsts = dict(reversed([(reward, i) for reward, i in known]))  # reward -> the first answer that has it
        steps = [firsts[reward] for reward in sorted(firsts, reverse=True)]
        if self.pairs == "best_worst":
            wanted = [(steps[0], steps[-1])] if steps else []
        elif self.pairs == "adjacent":
            wanted = list(zip(steps, steps[1:], strict=False))
        else:
            wanted = sorted(gaps, key=lambda pair: (-gaps[pair], pair))
        return self.first([pair for pair in wanted if pair in gaps], seed)


def rows_of_two(row: Row, answers: AnswerPairs) -> tuple[list[Row], bool]:
    """(a row for each pair, whether the row has several answers). A row of two sides is left as it is. Each pair's
    `key` names the two answers, from 1, where the row makes several. Raises DropPair where no two are compared."""
    form, key = sides_form(row), str(row.get("key"))
    if form is None:
        return [row], False
    if form.rewards is not None:
        if row.get("rejected_tools") not in (None, ""):
            raise DropPair("rejected_tools beside several answers: write {messages, tools} for each of them")
        rewards = form.rewards(row)
        columns = {name: row[name] for name in form.columns}
        pairs = answers.of_rewards(rewards, key)
        if sum(reward is not None for reward in rewards) < 2:
            raise DropPair(FEWER)
        if not pairs:
            gap = f" by min_reward_gap {answers.min_reward_gap}" if answers.min_reward_gap else ""
            raise DropPair(TIE + gap)
        made = [{name: [values[i], values[j]] for name, values in columns.items()} for i, j in pairs]
        return list(_named(row, pairs, made)), True
    several = [conversations_in(row[side]) if form is TRL else None for side in SIDES]
    if several == [None, None]:
        return [row], False
    chosen, rejected = (many or [row[side]] for many, side in zip(several, SIDES, strict=True))
    pairs = answers.first([(i, j) for i in range(len(chosen)) for j in range(len(rejected))], key)
    return list(_named(row, pairs, [dict(zip(SIDES, (chosen[i], rejected[j]), strict=True)) for i, j in pairs])), True


def source_key(key: str) -> str:
    """The key of the row that a pair comes from."""
    return re.sub(r" \(answers \d+ and \d+\)$", "", key)


def _named(row: Row, pairs: list[tuple[int, int]], made: list[Row]) -> Iterator[Row]:
    for (i, j), columns in zip(pairs, made, strict=True):
        name = f"{row.get('key')} (answers {i + 1} and {j + 1})" if len(pairs) > 1 else row.get("key")
        yield {**row, **columns, "key": name}


def _holds(item: Row) -> bool:
    return bool(set(HOLDS) & set(item)) or is_recorded(item)


def conversations_in(side: Any) -> list[Any] | None:
    """The conversations of a side that is a list of them: of lists of messages, of objects around such or around
    recorded sequences, or of texts. None for one conversation, one message or one text."""
    if not isinstance(side, list) or not side or role_of(side[0]) is not None:
        return None
    items = [structured(item) for item in side]
    several = (
        all(isinstance(item, list) for item in items)
        or all(isinstance(item, str) for item in items)
        or all(isinstance(item, dict) and role_of(item) is None and _holds(item) for item in items)
    )
    return items if several else None
