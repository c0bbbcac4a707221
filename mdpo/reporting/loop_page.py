"""The HTML report of a loop of iterations, loop_report.html, drawn anew after each stage from plain figures."""

import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from mdpo.console import say
from mdpo.reporting.health import ADVICE
from mdpo.reporting.html_page import PAGE, template
from mdpo.reporting.loop_plots import draw_loop
from mdpo.reporting.loop_tables import pair_rows, training_rows, trajectory_rows
from mdpo.reporting.loop_training import training_figures
from mdpo.reporting.token_view import VISIBLE
from mdpo.storage import replace_text

LOOP_PAGE = "loop_report.html"
AS_TEXT = {**VISIBLE, 0x0A: "\n", 0x09: "\t"}  # control characters are shown, lines stay lines


class LoopPage:
    """`settings` are what the loop's file says. A page that cannot be drawn costs one line, never the loop."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.settings = folder / LOOP_PAGE, settings
        self._warned = False

    def draw(self, figures: Callable[[], dict[str, Any]], stopped: str = "") -> bool:
        """Whether the page was replaced. `figures` gives those of `mdpo.rollouts.loop_figures`; `stopped` says why a
        loop ended before its last stage."""
        try:
            replace_text(self.path, page(self.path.parent, figures(), self.settings, stopped))
        except Exception as error:  # a full disk, say, or a damaged file, must not end days of iterations
            if not self._warned:
                say(f"warning: {LOOP_PAGE} could not be written, the loop continues: {type(error).__name__}: {error}")
            self._warned = True
            return False
        return True


def page(folder: Path, facts: dict[str, Any], settings: dict[str, Any], stopped: str = "") -> str:
    """The HTML of a loop in `folder`."""
    training, broken = _trained(facts["training"]), list(facts["broken"])
    broken += [found for found in training.values() if isinstance(found, str)]
    trained = {n: found for n, found in training.items() if isinstance(found, dict)}
    done = sum(finished for *_, finished in facts["stages"])
    following = next(((n, name) for n, name, finished in facts["stages"] if not finished), None)
    links = {n: _link(folder, facts["training"][n]) for n, found in trained.items() if found["page"]}
    now_s = time.time()
    text = template(LOOP_PAGE).render(
        name=folder.resolve().name,
        done=done,
        of=len(facts["stages"]),
        following=following,
        stopped=stopped,
        written=datetime.fromtimestamp(now_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        written_at=int(now_s),
        stages=_by_iteration(facts["stages"]),
        notes=notes(facts["evaluations"], trained, broken, stopped),
        plots={name: (title, Markup(svg)) for name, (title, svg) in draw_loop(facts, trained).items()},
        held_out=trajectory_rows(facts["evaluations"]),
        sampled=trajectory_rows(facts["samples"]),
        pairs=pair_rows(facts["pairs"]),
        training=training_rows(trained, links, settings["reference"]),
        columns={name: list(facts[name]) for name in ("evaluations", "samples", "pairs")} | {"training": list(trained)},
        tasks=facts["tasks"],
        visible=lambda text: str(text).translate(AS_TEXT),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000),
    )
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # half of a surrogate pair is in no encoding


def _trained(folders: dict[int, Path]) -> dict[int, dict[str, Any] | str]:
    """iteration -> figures of its training, or why they cannot be read."""
    found: dict[int, dict[str, Any] | str] = {}
    for n, folder in folders.items():
        try:
            found[n] = training_figures(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found[n] = f"{folder}: its report cannot be read ({type(error).__name__}: {error})."
    return found


def _link(folder: Path, training: Path) -> Markup:
    url = quote(Path(os.path.relpath(training / PAGE, folder)).as_posix())
    return Markup('<a href="{}">{}</a>').format(url, PAGE)


def _by_iteration(stages: list[tuple[int, str, bool]]) -> dict[int, list[tuple[str, bool]]]:
    found: dict[int, list[tuple[str, bool]]] = {}
    for n, name, finished in stages:
        found.setdefault(n, []).append((name, finished))
    return found


def notes(
    evaluations: dict[int, dict[str, Any]], training: dict[int, dict[str, Any]], broken: list[str], stopped: str
) -> list[tuple[str, bool]]:
    """(line, whether it is a warning) for what a reader should look at first."""
    lines = [(stopped[:1].upper() + stopped[1:], True)] if stopped else []
    lines += [(line, True) for line in broken]
    shares = {n: found["shares"]["right"] for n, found in evaluations.items()}
    if len(shares) > 1:
        first, last = min(shares), max(shares)
        moved = [f"{shares[n][0]:.4f} ({shares[n][1]:.3f} to {shares[n][2]:.3f})" for n in (first, last)]
        lines.append((f"Right answers: {moved[0]} of iteration {first}, {moved[1]} of iteration {last}.", False))
    for before, now in zip(list(shares)[:-1], list(shares)[1:], strict=True):
        if shares[now][0] < shares[before][1]:
            fell = f"fell from {shares[before][0]:.4f} to {shares[now][0]:.4f}, by more than the interval"
            lines.append((f"Iteration {now}: right answers {fell}.", True))
    for n, found in training.items():
        if found["line"]:
            lines.append((f"Iteration {n}: {found['line']}", False))
        lines += [(f"Iteration {n}: {warning}", True) for warning in found["warnings"] if warning != ADVICE]
    advised = any(ADVICE in found["warnings"] for found in training.values())
    return lines + [(ADVICE, False)] if advised else lines
