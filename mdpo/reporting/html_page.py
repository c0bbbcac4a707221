"""The HTML report of a run, run_report.html, and plots/*.png in the output folder, rewritten during the run."""

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from transformers import TrainerCallback

from mdpo.console import say
from mdpo.data.report import quantities, sequence_lines
from mdpo.reporting.environment import hardware, repository, versions
from mdpo.reporting.health import ADVICE, health_warnings
from mdpo.reporting.log_history import before_and_after, chosen_logps, latest_turns, not_finite
from mdpo.reporting.plots import write_plots
from mdpo.reporting.progress import StepTimer, clock
from mdpo.reporting.run_report import RESOLVED, SHOWN, speed_line
from mdpo.reporting.token_view import (
    CONTEXT,
    END,
    SHARED,
    SUPERVISED,
    VISIBLE,
    SequenceView,
    sample_pairs,
    sequence_views,
)
from mdpo.reporting.turn_tables import turn_tables
from mdpo.storage import replace_text
from mdpo.types import SIDES

TEMPLATES = Path(__file__).with_name("templates")
PAGE, PLOTS = "run_report.html", "plots"
EVERY_S = 60  # between evaluations and checkpoints
SHARE, SHARE_AT_EVENTS = 0.01, 0.1  # of the time, at most, is spent on drawing; at evaluations and checkpoints
HEAD, TAIL, LEAST = 150, 450, 40  # tokens of a long side that are shown: at its beginning and at its end
KINDS = (CONTEXT, SHARED, SUPERVISED, END)


class RunPage(TrainerCallback):
    """Draws on the main process at evaluations and checkpoints, between them at most every EVERY_S seconds, and at
    `finish`. A report that cannot be drawn costs one line, never the run; where drawing would take more than its share
    of the time, it waits for the next occasion."""

    def __init__(self, timer: StepTimer, data: dict[str, Any], train_dataset, tokenizer):
        self.timer, self.data, self.train_dataset, self.tokenizer = timer, data, train_dataset, tokenizer
        self.answers: list[dict[str, Any]] = []  # of `mdpo.reporting.shown_answers`
        self._facts: dict[str, Any] = {}
        self._last, self._cost, self._warned = 0.0, 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.draw(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw_after(self._cost / SHARE_AT_EVENTS, args, state)

    def on_save(self, args, state, control, **kwargs):
        self._draw_after(self._cost / SHARE_AT_EVENTS, args, state)

    def on_log(self, args, state, control, **kwargs):
        self._draw_after(max(EVERY_S, self._cost / SHARE), args, state)

    def _draw_after(self, seconds: float, args, state) -> None:
        if time.monotonic() - self._last >= seconds:
            self.draw(args, state)

    def finish(self, args, state, report: dict[str, Any]) -> None:
        """The HTML report of a finished run, with the metrics of its run_report.json."""
        self.draw(args, state, report)

    def draw(self, args, state, report: dict[str, Any] | None = None) -> None:
        if not state.is_world_process_zero:
            return
        begin = time.monotonic()
        try:
            self._facts = self._facts or self._collect(args)
            write_page(Path(args.output_dir), state, self._facts, self._now(args, state, report))
        except Exception as error:  # a full disk, say, must not end days of training
            if not self._warned:
                say(f"warning: {PAGE} could not be written, the run continues: {type(error).__name__}: {error}")
            self._warned = True
        self._last = time.monotonic()
        self._cost = self._last - begin

    def _collect(self, args) -> dict[str, Any]:
        """What stays the same throughout the run."""
        place, machine = repository(), hardware(args.world_size)
        rows = [*versions().items()]
        if place:
            rows.append(("commit", place["commit"] + (", with changes that are not in it" if place["changed"] else "")))
        rows += [(k, ", ".join(v) or "none" if k == "gpus" else v) for k, v in machine.items()]
        pairs = [shown_pair(pair) for pair in sample_pairs(self.train_dataset, self.tokenizer)]
        return {"data": self.data, "pairs": pairs, "machine": rows, "beta": args.beta}

    def _now(self, args, state, report: dict[str, Any] | None) -> dict[str, Any]:
        shown = {"answers": self.answers}
        if report is not None:
            return {**shown, "finished": True, "speed": [speed_line(report)], "left": ""}
        left = self.timer.remaining_seconds(state)
        pairs = self.timer.figures(args)["pairs_per_second"]
        speed = [f"{pairs:.2f} pairs/s, training steps alone"] if pairs else []
        return {**shown, "finished": False, "speed": speed, "left": "" if left is None else clock(left)}


def write_page(folder: Path, state, facts: dict[str, Any], now: dict[str, Any]) -> None:
    """The plots and the HTML report of `state`; the report is replaced atomically: no reader sees a part."""
    history, now_s = state.log_history, time.time()
    before, after = before_and_after(history)
    turns_of, names = latest_turns(history)
    resolved = folder / RESOLVED
    page = template(PAGE).render(
        **facts,
        **now,
        **turn_tables(names),
        name=folder.resolve().name,
        step=state.global_step,
        max_steps=state.max_steps,
        written=datetime.fromtimestamp(now_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        written_at=int(now_s),
        before=before,
        after=after,
        turns_of=turns_of,
        shown=SHOWN,
        quantities=quantities,
        sequence_lines=sequence_lines,
        notes=notes(history, facts["beta"], facts["data"]),
        plots={k: (title, Markup(svg)) for k, (title, svg) in write_plots(folder / PLOTS, history).items()},
        recipe=resolved.read_text(encoding="utf-8") if resolved.exists() else "",
    )
    replace_text(folder / PAGE, page)


def template(name: str) -> jinja2.Template:
    """A page's template from `templates/`, with `style`, the CSS of all pages."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return jinja2.Environment(loader=loader, **options).get_template(name, globals={"style": Markup(style)})


def notes(history: list[dict[str, Any]], beta: float, data: dict[str, Any]) -> list[tuple[str, bool]]:
    """(line, whether it is a warning) for what a reader should look at first."""
    line, _ = chosen_logps(history, beta)
    lines = [(line[:1].upper() + line[1:], False)] if line else []
    lines += [(said[:1].upper() + said[1:], said != ADVICE) for said in health_warnings(history, beta)]
    for name, count in not_finite(history).items():
        lines.append((f"Non-finite values of {name}: {count}. Plots leave them out.", True))
    return lines + [(warning, True) for warning in data["warnings"]]


def shown_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair of `mdpo.reporting.token_view` for the HTML report: the tokens of its sequences as HTML."""
    sides = []
    for name in SIDES:
        mask, views = pair[name]["mask"], sequence_views(pair[name])
        sequences = [{"title": v.title, "counts": v.counts, "html": _tokens(v)} for v in views]
        sides.append({"name": name, "tokens": len(mask), "supervised": sum(mask), "sequences": sequences})
    return {"key": pair["key"], "sides": sides}


def _tokens(view: SequenceView) -> Markup:
    """A sequence's tokens, of a long one some at its beginning and some at its end: a side shows HEAD + TAIL, those of
    several sequences a part each, but no fewer than LEAST."""
    columns = zip(view.tokens, view.ids, view.kinds, strict=True)
    spans = [_token(text, number, kind, t < view.shared) for t, (text, number, kind) in enumerate(columns)]
    head, tail = (max(n // view.of, LEAST) for n in (HEAD, TAIL))
    if len(spans) > head + tail:
        left_out = Markup("<i class=br>\n… {:,} tokens …\n</i>").format(len(spans) - head - tail)
        spans = [*spans[:head], left_out, *spans[-tail:]]
    return Markup("").join(spans)


def _token(text: str, number: int, kind: str, shared: bool) -> Markup:
    classes = f"t k{KINDS.index(kind)}" + " s" * (shared and kind in (SUPERVISED, END))
    shown = escape(text.translate(VISIBLE)).replace("↵\n", Markup('<i class="br">↵</i>\n'))
    return Markup('<span class="{}" title="id {} · {}">{}</span>').format(classes, number, kind, shown)
