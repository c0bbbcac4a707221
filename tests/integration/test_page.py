"""run_report.html, looked at in a real browser, and plots/*.png; a page that cannot be drawn never stops a run."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from browser import BROWSER, seen
from datasets import Dataset
from PIL import Image
from several_sequences import THOUGHTS, letters, plain_row, tokenized_row
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.data.report import DataReport, describe
from mdpo.data.tokenize import tokenize_dataset
from mdpo.masking.loss_mask import RenderSettings
from mdpo.reporting.html_page import PAGE, RunPage, shown_pair
from mdpo.reporting.progress import StepTimer

SECTIONS = ["figures", "notes", "plots", "turns", "data", "masks", "recipe", "machine"]
DRAWN = [
    *("loss", "reward_accuracy", "margins", "rewards", "logps", "grad_norm", "learning_rate", "tokens_per_second"),
    *("memory", "margins_by_turn", "margin_of_turns", "accuracy_by_turns"),
]
REPORT = {"pairs_per_second": 1.5, "steps": 200, "train_seconds": 533.0, "peak_memory_gb": 3.7}


def history(steps=200):
    """As of a run whose chosen log-probs fall: noise around curves, evaluations every 40 steps."""
    noise, logs = np.random.default_rng(0), []

    def figures(step, wobble):
        gone = 1 - math.exp(-step / 60)
        chosen, rejected = -1.2 * gone + wobble * noise.normal() / 3, -5 * gone + wobble * noise.normal()
        found = {
            "loss": 0.69 - 0.5 * gone + wobble * 0.05 * abs(noise.normal()),
            "rewards/accuracies": min(1.0, 0.5 + 0.45 * gone + wobble * 0.04 * noise.normal()),
            "rewards/margins": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "logps/chosen": -150 + 10 * chosen,
            "logps/rejected": -160 + 10 * rejected,
        }
        for k in range(1, 5):
            found |= {f"margins/turn_{k}": gone * k / 2, f"pairs/turn_{k}": 64 // k}
            found |= {
                f"accuracies/{k}_turns": 1 - 0.1 * k * gone,
                f"margins/{k}_turns": 4 * gone,
                f"pairs/{k}_turns": 16,
            }
        return found

    for step in range(steps + 1):
        if step:
            rate = 1e-5 * (1 - step / steps)
            more = {
                "grad_norm": 30 + 5 * noise.normal(),
                "learning_rate": rate,
                "tokens_per_second": 900 + 90 * noise.normal(),
            }
            logs.append({**figures(step, 1), **more, "peak_memory_gb": 3.1 + (step > 30), "step": step})
        if step % 40 == 0:
            logs.append({**{f"eval_{k}": v for k, v in figures(step, 0).items()}, "eval_pairs": 64, "step": step})
    logs[9]["grad_norm"] = math.inf
    return logs


def run_page(folder, logs, step=200, warnings=()):
    """A RunPage over pairs with hostile text, its arguments and its state."""
    (folder / "recipe_resolved.yaml").write_text("beta: 0.1 # <b>\noutput_dir: /a/long/path/" + "x" * 200 + "\n")
    tokenizer, rows = tokenizer_for(CHATML, "byte", eos="<|im_end|>"), agent_rows(4)
    rows[1]["chosen"][2] = {"role": "user", "content": "</pre><script>document.title='broken'</script>\n&amp; 🎉"}
    rows[1]["rejected"] = [*rows[1]["chosen"][:3], rows[1]["rejected"][3]]
    rows[2]["chosen"][0] = rows[2]["rejected"][0] = {"role": "user", "content": "over long " * 200}
    settings = RenderSettings(max_length=400)
    data, counts = tokenize_dataset(Dataset.from_list(rows), tokenizer, settings, "<i>set", 1)
    report = DataReport({"<i>set": counts}, 400, describe(data), notes=list(warnings)).as_dict()
    args = SimpleNamespace(
        output_dir=str(folder), beta=0.1, world_size=1, train_batch_size=4, gradient_accumulation_steps=1
    )
    state = SimpleNamespace(is_world_process_zero=True, log_history=logs, global_step=step, max_steps=200)
    timer = StepTimer()
    return RunPage(timer, report, data, tokenizer), args, state, timer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "my-run"
    folder.mkdir()
    page, args, state, _ = run_page(folder, history(), warnings=["lengths tell <em>chosen</em> apart"])
    page.finish(args, state, REPORT)
    assert page._warned is False
    return folder / PAGE


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """After 60 of 200 steps of 2 s each, and an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    page, args, state, timer = run_page(folder, history(60), step=60)
    timer.steps, timer.seconds = 60, 120.0
    timer.remaining_seconds = lambda state: 2.0 * (state.max_steps - state.global_step)
    page.on_evaluate(args, state, None)
    return folder / PAGE


def test_every_plot_is_there_and_decodes(finished):
    files = sorted((finished.parent / "plots").iterdir())
    assert [file.stem for file in files] == sorted(DRAWN)
    for file in files:
        with Image.open(file) as image:
            assert image.size == (768, 480) and len(set(image.convert("L").getdata())) > 20, file
    assert [p.name for p in finished.parent.iterdir() if p.name.endswith(".part")] == []


def test_the_page_is_one_file(finished):
    text = finished.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|<link|@import|url\((?!#)", text)
    assert "default-src 'none'" in text  # so a request that was made all the same would be an error on the console
    assert len(text) < 600_000


def test_answers_are_shown_side_by_side(tmp_path):
    """Before the end "after" is not there yet; a run that resumed without them has no "before"."""
    page, args, state, _ = run_page(tmp_path, history(60), step=60)
    page.draw(args, state)
    assert 'id="answers"' not in (tmp_path / PAGE).read_text(encoding="utf-8")
    row = {"key": "a", "turn": 2, "asked": "<b>1</b>?", "chosen": "one", "after": None}
    page.answers = [{**row, "before": {"text": "<i>two", "cut": True, "as_chosen": False}}]
    page.draw(args, state)
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "&lt;b&gt;1&lt;/b&gt;?" in text and "&lt;i&gt;two (no end)" in text and "<i>not yet</i>" in text
    page.answers = [{**row, "before": None, "after": {"text": "one", "cut": False, "as_chosen": True}}]
    page.finish(args, state, REPORT)
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<i>missing</i>" in text and "<i>as chosen</i>" in text and not page._warned


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(finished):
    page, console = seen(finished)
    assert console == []
    assert page["sections"] == SECTIONS and page["title"] == "my-run: finished"
    assert [name for name, *_ in page["plots"]] == [f"plot-{name}" for name in sorted(DRAWN, key=DRAWN.index)]
    assert all(width > 300 and height > 180 for _, width, height in page["plots"])
    texts = page["texts"]
    assert "0.2078" in texts["figures"] and "1.50 pairs/s over 200 steps" in texts["figures"]
    assert "Log-probs of the chosen side fell by 11.57 nats a pair" in texts["notes"]
    assert "Warning: The chosen side grew less likely by 11.57 nats a pair" in texts["notes"]
    assert "Non-finite values of grad_norm: 1" in texts["notes"]
    assert "lengths tell <em>chosen</em> apart" in texts["notes"] and "<i>set" in texts["data"]
    assert "dropped 1: over-long (row:3)" in texts["data"] and "beta: 0.1 # <b>" in texts["recipe"]
    assert re.search(r"margin\s+0.482\s+0.964\s+1.446\s+1.929", texts["turns"])
    for what in ("torch", "numpy", "python", "processor", "processes"):
        assert what in texts["machine"]
    answers = ["Let us compute it.\n```python\nprint({})\n```<|im_end|>{}<|im_end|>"]
    chosen, rejected, *_ = (text.replace("↵", "") for text in page["supervised"])
    assert chosen == answers[0].format("0 * 3", "The answer is \\boxed{0}.")
    assert rejected == answers[0].format("0 + 3", "So \\boxed{3}.")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_on_a_phone_nothing_is_wider_than_the_screen(finished):
    page, console = seen(finished, width=380)
    assert console == [] and page["width"] == 380 and page["scroll"] == page["client"]
    assert all(300 < width < 380 for _, width, _ in page["plots"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_of_a_run_that_goes_on(running, finished):
    page, console = seen(running)
    assert console == [] and page["sections"] == SECTIONS and page["title"].endswith(": step 60 of 200")
    assert "running: step 60 of 200, about 4:40 left" in page["texts"][""]
    assert "2.00 pairs/s" in page["texts"]["figures"] and "step 40" in page["texts"]["figures"]
    assert 'http-equiv="refresh"' in running.read_text() and 'http-equiv="refresh"' not in finished.read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_dark(finished, tmp_path):
    light = seen(finished)[0]
    page = tmp_path / PAGE
    page.write_text(finished.read_text().replace('<html lang="en">', '<html lang="en" class="dark">'))
    dark = seen(page)[0]
    assert (light["paper"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(31, 35, 40)")
    assert (dark["paper"], dark["ink"]) == ("rgb(13, 17, 23)", "rgb(230, 237, 243)")
    assert "var(--ink)" in finished.read_text() and not re.search("stroke: #(1f2328|57606a|d0d7de)", page.read_text())


def test_before_anything_is_logged(tmp_path):
    """No figures, no turns, no held-out pairs, no recipe yet, no commit."""
    page, args, state, _ = run_page(tmp_path, [], step=0)
    (tmp_path / "recipe_resolved.yaml").unlink()
    (tmp_path / "plots").mkdir()
    for name in ("loss", "mine"):  # of an earlier run, and the user's
        (tmp_path / "plots" / f"{name}.png").touch()
    page.on_train_begin(args, state, None)
    text = (tmp_path / PAGE).read_text()
    assert not page._warned and "No evaluation yet." in text and "Nothing logged yet." in text
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["mine.png"]
    assert [f'id="{name}"' in text for name in SECTIONS] == [True] * 8


def test_a_page_that_fails_costs_one_line(tmp_path, capsys):
    page, args, state, _ = run_page(tmp_path, history(10), step=10)
    args.output_dir = str(tmp_path / "recipe_resolved.yaml")  # a file
    page.on_evaluate(args, state, None)
    page.finish(args, state, REPORT)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "run_report.html could not be written, the run continues: NotADirectoryError" in line


def test_when_it_is_drawn(tmp_path, monkeypatch):
    """At logs at most every EVERY_S seconds; where drawing takes 3 s, every 300 s, and at checkpoints every 30 s."""
    page, args, state, _ = run_page(tmp_path, history(10), step=10)
    drawn, now = [], [1000.0]

    def write(*_):
        now[0] += 3
        drawn.append(now[0])

    monkeypatch.setattr("mdpo.reporting.html_page.write_page", write)
    monkeypatch.setattr("mdpo.reporting.html_page.time.monotonic", lambda: now[0])
    page.on_train_begin(args, state, None)
    for _ in range(500):
        now[0] += 1
        page.on_log(args, state, None)
    assert drawn == [1003.0, 1306.0]
    for _ in range(40):
        now[0] += 1
        page.on_save(args, state, None)
    assert drawn[2:] == [1510.0, 1543.0]
    state.is_world_process_zero = False
    page.on_evaluate(args, state, None)
    assert len(drawn) == 4


def test_a_long_side_is_shown_in_part():
    side = {"tokens": ["a\n"] * 1000, "ids": [7] * 1000, "mask": [1] * 1000, "ends": [], "breaks": []}
    side |= {"lengths": [1000], "shared": [2]}
    [shown] = shown_pair({"key": "k", "chosen": side, "rejected": side})["sides"][0]["sequences"]
    assert shown["html"].count("<span") == 600 and "… 400 tokens …" in shown["html"]
    assert shown["html"].count('class="t k2 s"') == 2 and shown["counts"].startswith("1000 tokens, 1000 supervised")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A report of a pair of two sequences a side, and of one of one sequence a side."""
    folder = tmp_path_factory.mktemp("several")
    tokenizer = letters()
    rows = Dataset.from_list([tokenized_row(tokenizer), plain_row(tokenizer)])
    _, args, state, timer = run_page(folder, [], step=0)
    page = RunPage(timer, DataReport({}, None, describe(rows)).as_dict(), rows, tokenizer)
    page.on_train_begin(args, state, None)
    assert page._warned is False
    return folder / PAGE


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_several_sequences_in_a_browser(several):
    page, console = seen(several)
    assert console == []
    assert [text.replace("↵", "") for text in page["supervised"]] == [
        "<think>sum</think>12<|im_end|>Yes.<|im_end|>",
        "<think>sum</think>13<|im_end|>No.<|im_end|>",
        "<think>sum</think>12<|im_end|>",
        "<think>sum</think>13<|im_end|>",
    ]
    masks, data = page["texts"]["masks"], page["texts"]["data"]
    assert f"sequence 2 of 2: {THOUGHTS} (56 tokens, 5 supervised, 24 shared)" in masks
    assert masks.count("sequence 1 of 2") == 2 and "of 1" not in masks  # one sequence has no heading
    assert re.search(r"rejected: 2 sequences, 86 tokens, 12 supervised\s+sequence 1 of 2", masks)
    assert re.search(r"sequences\s+1.5\s+2\s+2\s+2\s+1.5", data)
    assert "235 tokens in all sequences, 130 distinct: 0.55" in data


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_several_sequences_on_a_phone(several):
    page, console = seen(several, width=380)
    assert console == [] and page["scroll"] == page["client"]
