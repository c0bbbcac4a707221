"""The mask page, pairs token by token, opens from disk: python scripts/show_masks.py RECIPE.yaml --html masks.html

Kept pairs come first, then some of every drop reason, as far as their template renders them.
"""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from mdpo.data.files import whole_row
from mdpo.data.groups import rows_of_two, source_key
from mdpo.data.prepare import answer_pairs, prepare_pairs, render_settings
from mdpo.data.rows import row_to_pair
from mdpo.data.sources import load_datasets
from mdpo.data.template_fit import fit
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.spans import supervised, tokenize
from mdpo.masking.tokenizer import token_text
from mdpo.reporting.token_view import CONTEXT, END, SHARED, SUPERVISED, special_ids
from mdpo.types import SIDES

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
        first = sorted(range(len(rows)), key=list(rows["place"]).__getitem__)[:pairs]
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
    content = {"kinds": KINDS, "recipe": str(recipe.path), "pairs": shown}
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # no tag in it, so no end of the script
    page = PAGE.read_text(encoding="utf-8").replace("/*STYLE*/", STYLE.read_text(encoding="utf-8"))
    path.write_text(page.replace("/*DATA*/null", text), encoding="utf-8", errors="backslashreplace")
    counts: dict[str, int] = {}
    for pair in shown:
        counts[pair["reason"] or "kept"] = counts.get(pair["reason"] or "kept", 0) + 1
    return counts


def _of_two(row: dict[str, Any], answers) -> list[dict[str, Any]]:
    try:
        return rows_of_two(row, answers)[0]
    except DropPair:
        return [row]


class Explainer:
    """Raw rows → what the mask page shows of them."""

    def __init__(self, tokenizer, settings):
        self.tokenizer, self.settings, self.text_of = tokenizer, settings, token_text(tokenizer)
        self.template = ChatTemplate(tokenizer, settings.template_kwargs) if tokenizer.chat_template else None
        self.specials = special_ids(tokenizer)

    def __call__(self, row: dict[str, Any], kept: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        """{"key", "reason" ("" where kept), "shared": tokens, "sides": two lists of [text, id, role, kind]}, or
        "raw", the row's JSON, in place of the last two."""
        out = {"key": row["key"], "reason": reason}
        try:
            pair = fit(row_to_pair(row, self.settings.mask_turns, self.settings.different_prompts), self.template)
            shared = kept["shared_len"] if kept else 0
            sides = [self._side(pair, name, kept, shared) for name in SIDES]
        except DropPair:
            columns = {k: v for k, v in row.items() if k != "key"}
            return {**out, "raw": json.dumps(columns, indent=1, ensure_ascii=False, default=str)}
        return {**out, "shared": shared, "sides": sides}

    def _side(self, pair, name: str, kept, shared: int) -> list[list]:
        messages, pair = getattr(pair, name), pair.side(name)
        recorded = pair.recorded[SIDES.index(name)]
        if self.template is None and not isinstance(messages, str) and not recorded:
            raise DropPair("no chat template")
        if isinstance(messages, str) or recorded:
            whole = [t for ids, _ in recorded.sequences for t in ids] if recorded else None
            ids = kept[f"{name}_ids"] if kept else whole or self.tokenizer(messages)["input_ids"]
            roles, mask = ["text"] * len(ids), [0] * len(ids)
            texts = [self.text_of(tuple(ids[max(t - 1, 0) : t]), token) for t, token in enumerate(ids)]
        else:
            rendered = self.template.locate(messages, pair.n_prompt, pair.tools, **pair.template_kwargs)
            sampled, encoded = [(s.start, s.end) for s in rendered.spans], tokenize(rendered.text, self.tokenizer)
            ids, ranges, mask, _ = supervised(rendered.text, sampled, encoded, self.tokenizer)
            # A character split between tokens belongs to the first of them, one in no token to the token before.
            reached = [0, *accumulate((end for _, end in ranges), max)]
            begins = [*(start for start, _ in ranges[1:]), len(rendered.text)]
            places = zip(ranges, reached, begins, strict=False)
            texts = [rendered.text[max(start, seen) : max(end, begin)] for (start, end), seen, begin in places]
            spans = [(start, end, "assistant") for start, end in sampled]
            contents = [(a, b, messages[i]["role"]) for a, b, i in rendered.contents]
            roles = [next((role for a, b, role in spans + contents if a <= start and end <= b), "template")
                     for start, end in ranges]  # fmt: skip
        if kept:
            trained = kept[f"{name}_ids"]
            assert ids[: len(trained)] == trained, (
                f"{kept['key']}: the page would show other tokens than are trained on"
            )
            mask = kept[f"{name}_mask"]  # the very one that is trained on
        tokens = []
        for t, (token, role) in enumerate(zip(ids, roles, strict=True)):
            kind = CONTEXT if t >= shared else SHARED
            if t >= len(mask):
                kind = "cut off"
            elif mask[t]:
                ends = token in self.specials and (t + 1 == len(mask) or not mask[t + 1])
                kind = END if ends else SUPERVISED
            tokens.append([texts[t], token, role, KINDS.index(kind)])
        return tokens
