"""loop_report.html, looked at in a real browser; a page that cannot be drawn never stops a loop."""

import json
import re
import time

import pytest
from browser import BROWSER, seen
from loop_folder import SETTINGS, finish, logs, stages, trajectory, write_loop, write_training, write_trajectories

from mdpo.reporting.health import ADVICE
from mdpo.reporting.loop_page import LOOP_PAGE, LoopPage, notes
from mdpo.reporting.loop_plots import failed_calls
from mdpo.rollouts.iterations import DONE, TRAJECTORIES
from mdpo.rollouts.loop_figures import loop_figures

SECTIONS = ["figures", "notes", "plots", "pairs", "sampled", "training", "trajectories", "stages", "loop"]
DRAWN = ["right", "reward", "tokens", "turns", "ended", "pairs"] + [
    f"training_{x}" for x in ("accuracy", "margin", "ratio")
]
HOSTILE = (
    "</pre><script>document.title='broken'</script><img src=x onerror=alert(1)> &amp; \x1b[31m\x00 \ud800 {{ 7 * 7 }}"
)


def drawn(folder, stopped="", **settings):
    page = LoopPage(folder, {**SETTINGS, **settings})
    assert page.draw(lambda: loop_figures(stages(folder)), stopped), "not drawn"
    return page.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two iterations; the first held-out task is hostile wherever a text can be."""
    folder = write_loop(tmp_path_factory.mktemp("loop") / "my loop")
    path = folder / "iteration-2/evaluate"
    rows = [json.loads(line) for line in (path / TRAJECTORIES).read_text().splitlines()]
    changes = {"messages": [{"role": HOSTILE, "content": HOSTILE}, {"role": "assistant", "content": f"so: {HOSTILE}"}]}
    changes |= {"calls": [("python", "ok"), ("python", "timeout"), ("python", HOSTILE)], "ended": "environment error"}
    hostile = [trajectory("task-0", True, sample, error=HOSTILE, **changes) for sample in (0, 1)]
    rows = [trajectory(row["key"], row["reward"] == 1, row["sample"]) for row in rows[2:]]
    write_trajectories(path, hostile + rows)
    line = f"log-probs of the chosen side fell {HOSTILE[:20]}"
    write_training(
        folder / "iteration-2/train", [logs(1, 0.1)], chosen_logps={"line": line, "fell": True}, warnings=[line]
    )
    return drawn(folder, instruction=HOSTILE)


def test_the_page_is_one_file(finished):
    text = finished.read_text(encoding="utf-8")
    shown = re.sub(r"<pre>.*?</pre>|<div class=\"role\">.*?</div>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|<link|@import|url\((?!#)", shown) and "<img" not in text
    assert "default-src 'none'" in text and text.count("<script>") == 1
    assert "&lt;/pre&gt;&lt;script&gt;" in text and "\\ud800" in text and not re.search("[\x00\x1b]", text)
    assert [path.name for path in finished.parent.iterdir() if path.name.endswith(".part")] == []


def test_links_lead_to_the_reports_of_training(finished):
    links = re.findall(r'<a href="([^"]*)"', finished.read_text(encoding="utf-8"))
    assert links == [f"iteration-{n}/train/run_report.html" for n in (1, 2)]
    assert all((finished.parent / link).is_file() for link in links)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(finished):
    page, console = seen(finished)
    assert console == [] and page["title"] == "my loop: finished" and page["sections"] == SECTIONS
    names = [name for name, *_ in page["plots"]]
    assert names == [f"plot-{name}" for name in [*DRAWN[:5], "calls", *DRAWN[5:]]]
    assert all(width > 300 and height > 180 for _, width, height in page["plots"])
    texts = page["texts"]
    # of 4 tasks 2, 3 and 2 are right, of two samples each until the last iteration
    assert re.search(r"pass@1\)\s+0.5000 \(0.150 to 0.850\)\s+0.7500 \(0.301 to 0.954\)\s+0.5000", texts["figures"])
    assert re.search(r"pass\^2\)\s+0.5000 \(0.150 to 0.850\)\s+0.7500", texts["figures"])
    assert re.search(r"tokens, a turn, mean\s+2.5\s+2.5\s+2.5", texts["figures"])
    assert re.search(r"calls: timeout\s+0\s+0\s+2 \(\d+ %\)", texts["figures"])
    assert "Warning: Iteration 2: log-probs of the chosen side fell" in texts["notes"]
    assert re.search(r"the chosen side is longer\s+2 \(33 %\)\s+2 \(29 %\)", texts["pairs"])
    assert re.search(r"reference\s+the first policy\s+the policy of iteration 1", texts["training"])
    assert re.search(r"\(nats a pair\)\s+0.9750\s+0.5000", texts["training"])  # 0.195 / 0.2, 0.1 / 0.2
    assert texts["trajectories"].count("iteration 1") == 3 and texts["trajectories"].count("✓ right") == 7
    assert "so: </pre><script>" in texts["trajectories"] and "{{ 7 * 7 }}" in texts["loop"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_on_a_phone_nothing_is_wider_than_the_screen(finished):
    page, console = seen(finished, width=380)
    assert console == [] and page["width"] == 380 and page["scroll"] == page["client"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_dark(finished, tmp_path):
    page = tmp_path / LOOP_PAGE
    page.write_text(finished.read_text(encoding="utf-8").replace('<html lang="en">', '<html lang="en" class="dark">'))
    dark, light = seen(page)[0], seen(finished)[0]
    assert (light["paper"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(31, 35, 40)")
    assert (dark["paper"], dark["ink"]) == ("rgb(13, 17, 23)", "rgb(230, 237, 243)")


@pytest.mark.parametrize("done", range(10))
def test_after_each_stage_of_a_loop(done, tmp_path):
    """The page shows what is there, and says what is next; of a loop that goes on it renews itself."""
    write_loop(tmp_path)
    order = stages(tmp_path)
    for _, folder in order[done:]:
        (folder / DONE).unlink()
    text = drawn(tmp_path).read_text(encoding="utf-8")
    assert [f'id="{name}"' in text for name in SECTIONS] == [True] * len(SECTIONS)
    assert ('http-equiv="refresh"' in text) is (done < 9) and f"<b>{done if done < 9 else 9}</b>" in text
    if done < 9:
        n, folder = order[done]
        assert f"next: iteration <b>{n}</b>, <b>{folder.name}</b>" in text
    assert ("No evaluation yet." in text) is (done < 1) and ("No training yet." in text) is (done < 4)


def test_a_broken_stage_is_named_and_the_rest_is_there(tmp_path):
    write_loop(tmp_path)
    (tmp_path / "iteration-1/train/run_report.json").write_text('{"recipe": ')
    (tmp_path / "iteration-2/train/trainer_state.json").unlink()
    (tmp_path / "iteration-2/evaluate/trajectories.jsonl").write_text("[]\n")
    text = drawn(tmp_path).read_text(encoding="utf-8")
    for name in ("iteration-1/train", "iteration-2/train", "iteration-2/evaluate/trajectories.jsonl:1"):
        assert f"Warning: {tmp_path}/{name}" in text
    assert "0.7500 (0.301 to 0.954)" in text and "No training yet." in text


def test_a_loop_that_stopped(tmp_path):
    text = drawn(write_loop(tmp_path), "iteration 1 got worse by more than the interval: stopped.").read_text()
    assert "Warning: Iteration 1 got worse" in text and 'http-equiv="refresh"' not in text


def test_right_answers_that_fell_are_a_warning():
    """0.50 is below the interval of 0.80 that begins at 0.711, 0.72 is not."""

    def of(share):
        return {"shares": {"right": (share, share - 0.089, share + 0.07)}}

    fell, alarm = notes({0: of(0.8), 1: of(0.5)}, {}, [], "")[-1]
    assert alarm and fell == "Iteration 1: right answers fell from 0.8000 to 0.5000, by more than the interval."
    assert not any(alarm for _, alarm in notes({0: of(0.8), 1: of(0.72)}, {}, [], ""))
    trained = {n: {"line": "", "warnings": ["fell", ADVICE]} for n in (1, 2)}
    assert notes({}, trained, [], "") == [("Iteration 1: fell", True), ("Iteration 2: fell", True), (ADVICE, False)]


def test_many_kinds_of_failed_calls_are_drawn_together():
    calls = {"ok": 10, **{f"kind {n}": n + 1 for n in range(9)}}
    stacks = failed_calls({0: {"calls": calls}})
    assert [stack.label for stack in stacks[:2]] == ["kind 8", "kind 7"] and stacks[-1].label == "4 other kinds"
    assert sum(stack.values[0] for stack in stacks) == pytest.approx(45 / 55)


def test_a_page_that_fails_costs_one_line(tmp_path, capsys):
    page = LoopPage(tmp_path / "none", SETTINGS)
    for _ in range(2):
        assert not page.draw(lambda: loop_figures(stages(write_loop(tmp_path / "loop"))))
    assert not LoopPage(tmp_path, SETTINGS).draw(lambda: {}["stages"])
    first, second = capsys.readouterr().out.splitlines()
    assert "loop_report.html could not be written, the loop continues: FileNotFoundError" in first
    assert "KeyError: 'stages'" in second and not (tmp_path / LOOP_PAGE).exists()


@pytest.mark.slow
def test_ten_thousand_trajectories(tmp_path):
    """Each file is read once, whatever number of stages follow it."""
    folder = finish(tmp_path / "iteration-0/evaluate")
    write_trajectories(
        folder, [trajectory(f"task-{n}", n % 3 == 0, k, (200, 200)) for n in range(2500) for k in range(4)]
    )
    page, begin = LoopPage(tmp_path, SETTINGS), time.monotonic()
    assert page.draw(lambda: loop_figures([(0, folder)]))
    first = time.monotonic() - begin
    (folder / TRAJECTORIES).chmod(0o400)
    assert page.draw(lambda: loop_figures([(0, folder)]))
    assert time.monotonic() - begin - first < max(5.0, first) and page.path.stat().st_size < 400_000
