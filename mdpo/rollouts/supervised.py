"""Trajectories → rows for TRL's SFTTrainer: `input_ids` and `assistant_masks`, which it takes as they are. So every
token that SFT learns is one that preference learning would supervise, in the same context."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mdpo.data.files import json_rows
from mdpo.data.messages import normalize_messages
from mdpo.data.recorded import read_sequences
from mdpo.data.tool_calls import linked, read_tools
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.recorded import refuse_unknown_ids
from mdpo.masking.sequences import side_sequences
from mdpo.rollouts.pairing import HALF, UNFINISHED, check_reward, has_half_pairs
from mdpo.types import RecordedSide

Sequence = tuple[list[int], list[int]]  # ids, and 1 where the token is learned


@dataclass
class SftReport:
    """Counts; `left_out` has those of trajectories by reason. `tools` are those of the first one that has any."""

    trajectories: int = 0
    taken: int = 0
    sequences: int = 0
    tokens: int = 0
    learned: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    tools: list[dict[str, Any]] | None = None

    def lines(self) -> list[str]:
        left_out = [f"  left out: {n} {why}" for why, n in sorted(self.left_out.items())]
        taken = f"{self.taken} of {self.trajectories} trajectories, {self.sequences} sequences"
        return [f"{taken}: {self.tokens} tokens, {self.learned} of them learned", *left_out]


def sft_rows(
    paths: Iterable[Path], template: ChatTemplate, max_length: int | None, min_reward: float = 1.0
) -> tuple[Iterator[dict[str, list[int]]], SftReport]:
    """Trajectories are {"messages"} with "tools", "sequences", "ended" and "reward" or "correct" where they have them;
    of those with a reward the ones below `min_reward` are left out. Rows are made one by one, and the report is whole
    when they are at their end. Raises UserError, while the rows are made."""
    report = SftReport()
    return _rows(paths, template, max_length, min_reward, report), report


def _rows(
    paths: Iterable[Path], template: ChatTemplate, max_length: int | None, min_reward: float, report: SftReport
) -> Iterator[dict[str, list[int]]]:
    for path in paths:
        if not path.is_file():
            raise UserError(f"trajectories: there is no file {path}.")
        rows = tqdm(json_rows(str(path)), desc=f"reading {path}", unit=" rows", delay=3, disable=None)
        for place, row in rows:
            report.trajectories += 1
            reward = row.get("reward", row.get("correct"))
            check_reward(reward, f"{path}:{place}")
            if why := _unwanted(row, reward, min_reward):
                report.left_out[why] += 1
                continue
            try:
                sequences = _sequences(row, template)
            except DropPair as reason:
                report.left_out[reason.key] += 1
                continue
            if max_length is not None and max(len(ids) for ids, _ in sequences) > max_length:
                report.left_out[f"longer than max_length {max_length}"] += 1
                continue
            report.taken += 1
            report.tools = report.tools or read_tools(row.get("tools"))
            report.sequences += len(sequences)
            report.tokens += sum(len(ids) for ids, _ in sequences)
            report.learned += sum(sum(mask) for _, mask in sequences)
            yield from ({"input_ids": ids, "assistant_masks": mask} for ids, mask in sequences)


def _unwanted(row: dict[str, Any], reward: float | None, min_reward: float) -> str | None:
    if row.get("ended") in UNFINISHED:
        return "not ended by the policy"
    if has_half_pairs(row):
        return HALF
    if reward is None:
        return "without a reward" if {"reward", "correct"} & row.keys() else None
    return f"of a reward below {min_reward:g}" if reward < min_reward else None


def _sequences(row: dict[str, Any], template: ChatTemplate) -> list[Sequence]:
    """As they were sampled, where the row says so; else as the masks of preference pairs have them. Raises DropPair."""
    if row.get("sequences"):
        sequences = read_sequences(row["sequences"], "trajectory", {})
        refuse_unknown_ids(RecordedSide(sequences), "trajectory", template.tokenizer)
        return sequences
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise DropPair("no messages")
    messages = linked(normalize_messages(messages))
    first = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    conversation = Conversation(messages, row.get("prompt_messages") or first, template, read_tools(row.get("tools")))
    return [(sequence.ids, sequence.mask) for sequence in side_sequences(conversation).sequences]
