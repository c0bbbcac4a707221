"""Greedy answers of `shown_answers.py` as lines for a terminal."""

from typing import Any


def lines_of(rows: list[dict[str, Any]], width: int = 80, most: int = 4) -> list[str]:
    """`rows` of ShownAnswers for a terminal: what was as chosen and what was cut, then the first `most` turns."""
    lines = [f"Greedy answers to {len(rows)} chosen turns of held-out pairs, in their context:"]
    for name in ("before", "after"):
        known = [row[name] for row in rows if row[name]]
        same, cut = sum(a["as_chosen"] for a in known), sum(a["cut"] for a in known)
        lines.append(f"  {name:6}  {same} as chosen, {cut} without an end" if known else f"  {name:6}  missing")
    for row in rows[:most]:
        key = row["key"].rpartition("/")[2]  # a file's folder would fill the line
        lines.append(short(f"{key} turn {row['turn']}: {row['asked']}", width, keep_end=True))
        lines.append(short(f"  chosen  {row['chosen']}", width))
        lines += [short(f"  {name:6}  {_shown(row[name])}", width) for name in ("before", "after")]
    return [*lines, *([f"{len(rows) - most} more turns are in run_report.html."] if len(rows) > most else [])]


def _shown(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "missing"
    return "as chosen" if answer["as_chosen"] else "(no end) " * answer["cut"] + answer["text"]


def short(text: str, width: int, keep_end: bool = False) -> str:
    """One line of at most `width` characters; of a longer one the middle is left out where its end is to stay."""
    text = text.rstrip().replace("\n", "↵")
    if len(text) <= width:
        return text
    tail = width // 2 if keep_end else 0
    return f"{text[: width - 1 - tail]}…{text[-tail:] if tail else ''}"
