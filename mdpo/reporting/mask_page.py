"""The mask page, pairs token by token, opens from disk: python scripts/show_masks.py RECIPE.yaml --html masks.html

Kept pairs come first, then some of every drop reason, as far as their template renders them.
"""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mdpo.data.files import whole_row
from mdpo.data.groups import rows_of_two, source_key
from mdpo.data.prepare import answer_pairs, prepare_pairs, render_settings
from mdpo.data.rows import row_to_pair
from mdpo.data.sources import load_datasets
from mdpo.data.template_fit import fit
from mdpo.data.whole_columns import whole_numbers
from mdpo.errors import DropPair, UserError
from mdpo.masking import sequences
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.sequences import RenderedSequence
from mdpo.masking.spans import tokenize
from mdpo.masking.tokenizer import token_text
from mdpo.reporting.token_view import (
    CONTEXT,
    END,
    SHARED,
    SUPERVISED,
    sequence_title,
    shared_tokens,
    special_ids,
    token_kinds,
    token_texts,
    turn_ends,
)
from mdpo.types import SIDES, sequence_lengths, split

PAGE, STYLE = (Path(__file__).with_name("templates") / name for name in ("mask_page.html", "page.css"))
KINDS = [CONTEXT, SHARED, SUPERVISED, END, "cut off"]
OF_A_REASON = 20  # pairs


def write_page(path: Path, recipe, tokenizer, pairs: int) -> dict[str, int]:
    """Writes the mask page: the first `pairs` kept pairs and up to OF_A_REASON of each drop reason. Returns how many of
    each. Raises UserError."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"--html: there is no folder {path.absolute().parent}.")
    if path.is_dir():
        raise UserError(f"--html: {path} is a folder; name a file in it.")
    try:
        rows, _, report = prepare_pairs(recipe, tokenizer)
        first = sorted(range(len(rows)), key=whole_numbers(rows, "place").tolist().__getitem__)[:pairs]
        kept = {row["key"]: row for row in rows.select(first)}
        reasons = {
            key: reason
            for c in report.counts.values()
            for reason, keys in c.reasons.items()
            for key in keys[:OF_A_REASON]
        }
    except UserError as error:
        raise UserError(f"{error}\nThere is nothing to show.") from error
    order = list(kept) + [key for key in reasons if key not in kept]
    data = recipe.data
    parts = load_datasets(data.dataset_mixer, data.dataset_splits, data.dataset_configs)
    parts += load_datasets(data.eval_dataset_mixer, splits=None) if data.eval_dataset_mixer else []
    raw, sources = {}, {source_key(key) for key in order}
    for part in parts:
        wanted = (whole_row(part.rows[i]) for i, key in enumerate(part.rows["key"]) if key in sources)
        raw |= {pair["key"]: pair for row in wanted for pair in _of_two(row, answer_pairs(recipe))}
    explain = Explainer(tokenizer, render_settings(recipe))
    shown = [explain(raw[key], kept.get(key), reasons.get(key, "")) for key in order if key in raw]
    path.write_text(page_text(str(recipe.path), shown), encoding="utf-8", errors="backslashreplace")
    counts: dict[str, int] = {}
    for pair in shown:
        counts[pair["reason"] or "kept"] = counts.get(pair["reason"] or "kept", 0) + 1
    return counts


def page_text(recipe: str, shown: list[dict[str, Any]]) -> str:
    """The page's HTML with what `Explainer` makes of each row."""
    content = json.dumps({"kinds": KINDS, "recipe": recipe, "pairs": shown}, ensure_ascii=False)
    page = PAGE.read_text(encoding="utf-8").replace("/*STYLE*/", STYLE.read_text(encoding="utf-8"))
    return page.replace("/*DATA*/null", content.replace("<", "\\u003c"))  # no tag in it, so no end of the script


def _of_two(row: dict[str, Any], answers) -> list[dict[str, Any]]:
    try:
        return rows_of_two(row, answers)[0]
    except DropPair:
        return [row]


def side_sequences(messages, pair, template: ChatTemplate) -> list[RenderedSequence]:
    """Raises DropPair."""
    return sequences.side_sequences(_conversation(messages, pair, template)).sequences


def whole_text(messages, pair, template: ChatTemplate) -> list[RenderedSequence]:
    """A side as one sequence, the whole text that the template writes. Raises DropPair."""
    conversation = _conversation(messages, pair, template)
    ids, ranges = tokenize(conversation.text, template.tokenizer)
    return [RenderedSequence(conversation.text, ids, ranges, [0] * len(ids), conversation.whole.marks.contents())]


def _conversation(messages, pair, template: ChatTemplate) -> Conversation:
    return Conversation(messages, pair.n_prompt, template, pair.tools, pair.template_kwargs)


@dataclass
class _Sequence:
    """A sequence to be shown: id, text and role of each token, and the mask of those that are trained on."""

    ids: list[int]
    texts: list[str]
    roles: list[str]
    mask: list[int]
    why: str

    @property
    def trained_ids(self) -> list[int]:
        return self.ids[: len(self.mask)]


class Explainer:
    """Raw rows → what the mask page shows of them."""

    def __init__(self, tokenizer, settings):
        self.tokenizer, self.settings, self.text_of = tokenizer, settings, token_text(tokenizer)
        self.template = ChatTemplate(tokenizer, settings.template_kwargs) if tokenizer.chat_template else None
        self.specials = special_ids(tokenizer)

    def __call__(self, row: dict[str, Any], kept: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        """{"key", "reason" ("" where kept), "sides": two lists of sequences {"title", "shared": tokens, "tokens":
        [text, id, role, kind] each}}, or "raw", the row's JSON, in place of the sides."""
        out = {"key": row["key"], "reason": reason}
        try:
            pair = fit(row_to_pair(row, self.settings.mask_turns, self.settings.different_prompts), self.template)
            sides = [self._sequences(pair, name, kept) for name in SIDES]
        except DropPair:
            columns = {k: v for k, v in row.items() if k != "key"}
            return {**out, "raw": json.dumps(columns, indent=1, ensure_ascii=False, default=str)}
        shared = iter(shared_tokens([sequence.trained_ids for side in sides for sequence in side]))
        shown = [[self._shown(sequence, i, side, next(shared)) for i, sequence in enumerate(side)] for side in sides]
        return {**out, "sides": shown}

    def _sequences(self, pair, name: str, kept) -> list[_Sequence]:
        """The sequences of a side as far as its row tells, with the masks that are trained on where it is kept."""
        messages, pair = getattr(pair, name), pair.side(name)
        recorded = pair.recorded[SIDES.index(name)]
        if recorded or isinstance(messages, str):
            return self._without_roles(messages, name, kept, recorded)
        if self.template is None:
            raise DropPair("no chat template")
        of_side = side_sequences if self.settings.mask_turns else whole_text
        sequences = [self._rendered(s, messages) for s in of_side(messages, pair, self.template)]
        if kept and not _set_trained(sequences, kept, name):
            # Under TRL's rule no turn is tokenized apart from its header.
            assert not self.settings.mask_turns, f"{kept['key']}: the page would show other tokens than are trained on"
            return self._without_roles(messages, name, kept)
        return sequences

    def _rendered(self, sequence: RenderedSequence, messages) -> _Sequence:
        text, ranges = sequence.text, sequence.ranges
        # A character split between tokens belongs to the first of them, one in no token to the token before.
        reached = [0, *accumulate((end for _, end in ranges), max)]
        begins = [*(start for start, _ in ranges[1:]), len(text)]
        places = zip(ranges, reached, begins, strict=False)
        texts = [text[max(start, seen) : max(end, begin)] for (start, end), seen, begin in places]
        contents = [(a, b, messages[i]["role"]) for a, b, i in sequence.contents]
        roles = ["assistant" if bit else next((role for a, b, role in contents if a <= start and end <= b), "template")
                 for bit, (start, end) in zip(sequence.mask, ranges, strict=True)]  # fmt: skip
        return _Sequence(sequence.ids, texts, roles, sequence.mask, sequence.why)

    def _without_roles(self, text, name: str, kept, recorded=None) -> list[_Sequence]:
        """The tokens decoded, of plain texts and of recorded sequences (ids and mask each)."""
        if kept:
            lengths = sequence_lengths(kept, name)
            parts = list(zip(*(split(kept[f"{name}_{field}"], lengths) for field in ("ids", "mask")), strict=True))
        elif recorded:
            parts = recorded.sequences
        else:
            ids = self.tokenizer(text)["input_ids"]
            parts = [(ids, [0] * len(ids))]
        reasons = ["", *((kept or {}).get(f"{name}_breaks") or []), *[""] * len(parts)]
        return [
            _Sequence(ids, token_texts(ids, self.text_of), ["text"] * len(ids), mask, why)
            for (ids, mask), why in zip(parts, reasons, strict=False)
        ]

    def _shown(self, sequence: _Sequence, i: int, side: list, shared: int) -> dict[str, Any]:
        ids, mask = sequence.ids, sequence.mask
        kinds = token_kinds(mask, turn_ends(ids[: len(mask)], mask, self.specials), shared)
        kinds += ["cut off"] * (len(ids) - len(mask))
        numbers = [KINDS.index(kind) for kind in kinds]
        tokens = list(map(list, zip(sequence.texts, ids, sequence.roles, numbers, strict=True)))
        return {"title": sequence_title(i + 1, len(side), sequence.why), "shared": shared, "tokens": tokens}


def _set_trained(sequences: list[_Sequence], kept: dict[str, Any], name: str) -> bool:
    """Gives rendered sequences the masks that are trained on; what was cut off has none, be it a whole sequence.
    False where those that are trained on are not among them."""
    lengths = sequence_lengths(kept, name)
    columns = (split(kept[f"{name}_{field}"], lengths) for field in ("ids", "mask"))
    trained = list(zip(*columns, strict=True))
    for sequence in sequences:
        whole = bool(trained) and sequence.ids[: len(trained[0][0])] == trained[0][0]
        sequence.mask = trained.pop(0)[1] if whole else []
    return not trained
