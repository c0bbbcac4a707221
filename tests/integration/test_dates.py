"""Templates that write the day: a resumed run tomorrow keeps that of its first start, and all say it."""

import json
import shutil
from dataclasses import replace

import pytest
import sample
from datasets import Dataset
from errors import dropped, refused
from safetensors.torch import load_file
from tiny import save_workshop, tokenizer_for, trl_template

import run_dpo
from mdpo.config.recipe import load_recipe
from mdpo.data.tokenize import tokenize_dataset
from mdpo.masking import dates
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings
from mdpo.runs.entrypoint import run

ASKING = [{"role": "user", "content": "Hi"}]
LLAMA = "llama3_2"


@pytest.fixture
def clock(monkeypatch):
    """A function that sets the day of this machine."""
    return lambda day: monkeypatch.setattr(dates, "today", lambda: day)


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """A function: run_dpo.py with flags -> (exit code, what it says)."""
    tokenizer = tokenizer_for(trl_template(LLAMA), "byte", eos="<|eot_id|>")
    keys = f"per_device_train_batch_size: 1\nnum_train_epochs: 1\nsave_steps: 2\noutput_dir: {tmp_path}/out\n"
    save_workshop(tmp_path, tokenizer, keys)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def started(*flags):
        code = run(run_dpo.main, [str(tmp_path / "recipe.yaml"), *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return started


def test_a_run_goes_on_tomorrow_with_the_day_of_its_start(start, clock, tmp_path):
    clock("2026-11-27")
    code, said = start()
    assert code == 0 and "writes the day into conversations, 2026-11-27, today" in said
    assert 'chat_template_kwargs: {date_string: "27 Nov 2026"}' in said
    whole = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other / "checkpoint-2")
    facts = json.loads((checkpoint / "manifest.json").read_text())
    assert dates.day_of(checkpoint) == dates.day_of(tmp_path / "out") == "2026-11-27"

    clock("2026-11-28")
    code, said = start(f"--output_dir={other}")
    assert code == 0 and f"2026-11-27, the day of the first start, which {other}/checkpoint-2 keeps" in said
    again = load_file(other / "model.safetensors")
    assert all((again[name] == weight).all() for name, weight in whole.items())
    run_facts = json.loads((other / "checkpoint-4" / "manifest.json").read_text())["run"]
    assert run_facts["contents"] == facts["run"]["contents"]  # of the same tokens

    # The wrong twin: a checkpoint that keeps no day is of another run tomorrow, and the message has the two days.
    shutil.rmtree(other)
    facts["run"]["names"]["chat_template_kwargs"] = None
    shutil.copytree(checkpoint, other / "checkpoint-2")
    (other / "checkpoint-2" / "manifest.json").write_text(json.dumps(facts))
    code, said = start(f"--output_dir={other}")
    assert code == 1 and "is of another run" in said and "2026-11-28, today (" in said and "keeps none" in said
    code, said = start(f"--output_dir={other}", '--chat_template_kwargs={date_string: "27 Nov 2026"}')
    assert code == 0 and "writes the day" not in said


def test_the_resolved_recipe_and_the_scripts_have_the_day(start, clock, tmp_path, capsys):
    clock("2026-11-27")
    assert start("--max_steps=1", "--save_strategy=no")[0] == 0
    clock("2026-11-28")
    assert load_recipe([str(tmp_path / "out" / "recipe_resolved.yaml")]).data.chat_template_kwargs == {
        "strftime_now": "2026-11-27"
    }
    import check_data
    import show_masks

    assert run(check_data.main, [str(tmp_path / "recipe.yaml")]) == 0
    assert "conversations, 2026-11-28, today" in capsys.readouterr().out
    assert run(show_masks.main, [str(tmp_path / "recipe.yaml"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "conversations, 2026-11-28, today" in err
    assert "".join(json.loads(out.splitlines()[0])["chosen"]["tokens"]).count("Today Date: 28 Nov 2026") == 1
    assert run(show_masks.main, [str(tmp_path / "out" / "recipe_resolved.yaml"), "--json"]) == 0
    assert "Today Date: 27 Nov 2026" in "".join(json.loads(capsys.readouterr().out.splitlines()[0])["chosen"]["tokens"])
    import evaluate

    out, recipe = str(tmp_path / "out"), str(tmp_path / "recipe.yaml")
    assert run(evaluate.main, [out, f"--recipe={recipe}", "--test_split_size=2"]) == 0
    assert f"2026-11-27, the day of the first start, which {out} keeps" in capsys.readouterr().out


def test_sampling_goes_on_tomorrow_with_the_day_of_its_start(start, clock, tmp_path, capsys):
    """Of a policy that keeps no day, as TRL's SFT and a hub's models: the trajectories do."""
    model, recipe = (
        load_recipe([str(tmp_path / "recipe.yaml"), "--report_to=none"]).model,
        str(tmp_path / "recipe.yaml"),
    )
    (tmp_path / "t.jsonl").write_text('{"prompt": "Hi", "key": "a"}\n{"prompt": "Ho", "key": "b"}\n')
    (tmp_path / "e.py").write_text("def nothing(completions, **row):\n    return [0.0]\n\n\nclass E:\n"
                                   "    def reset(self, **row):\n        return None\n")  # fmt: skip
    told = [model.model_name_or_path, f"--recipe={recipe}", f"--tasks={tmp_path}/t.jsonl", f"--save={tmp_path}/s.jsonl",
            f"--environment={tmp_path}/e.py:E", f"--rewards={tmp_path}/e.py:nothing", "--max_turns=1",
            "--max_new_tokens=3", "--temperature=1"]  # fmt: skip
    clock("2026-11-27")
    sample.main([*told, "--samples=1"])
    clock("2026-11-28")
    sample.main([*told, "--samples=2"])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").open()]
    assert len(rows) == 4 and {row["settings"]["strftime_now"] for row in rows} == {"2026-11-27"}
    assert len({json.dumps(row["sequences"][0]["input_ids"][:20]) for row in rows if row["key"] == "a"}) == 1
    sample.main([*told[:3], f"--save={tmp_path}/other.jsonl", *told[4:]])
    assert json.loads((tmp_path / "other.jsonl").open().readline())["settings"]["strftime_now"] == "2026-11-28"


def test_tokens_kept_from_yesterday_are_not_todays(clock):
    tokenizer = tokenizer_for(trl_template(LLAMA), "byte", eos="<|eot_id|>")
    rows = Dataset.from_list([{"chosen": [*ASKING, {"role": "assistant", "content": a}], "rejected": [
        *ASKING, {"role": "assistant", "content": "no"}]} for a in ("yes", "sure")])  # fmt: skip
    texts = []
    for day in ("2026-11-27", "2026-11-28", "2026-11-27"):
        clock(day)
        done, _ = tokenize_dataset(rows, tokenizer, RenderSettings(None), "rows")
        texts.append(tokenizer.decode(done[0]["chosen_ids"]))
    assert "Today Date: 27 Nov 2026" in texts[0] and "Today Date: 28 Nov 2026" in texts[1] and texts[0] == texts[2]
    fixed = replace(RenderSettings(None), template_kwargs={"strftime_now": "2020-02-29"})
    assert "29 Feb 2020" in tokenizer.decode(tokenize_dataset(rows, tokenizer, fixed, "rows")[0][0]["chosen_ids"])


def test_one_day_whatever_midnight_does_in_between(clock):
    clock("2026-11-27")
    template = ChatTemplate(tokenizer_for(trl_template(LLAMA), "byte", eos="<|eot_id|>"))
    clock("2026-11-28")
    assert "27 Nov 2026" in template.render(ASKING) and "28 Nov" not in template.render(ASKING, generation=True)


@pytest.mark.parametrize(("name", "words"), [(LLAMA, "date_string"), ("gptoss", "strftime_now")])
def test_the_line_names_a_variable_that_fixes_the_day(name, words, clock):
    """Taken at its word it gives the same text on another day; and then there is nothing to say."""
    clock("2026-11-27")
    tokenizer = tokenizer_for(trl_template(name), "byte", eos="<eos>")
    recipe = _Recipe()
    [line] = dates.fix_day(recipe, tokenizer)
    today = ChatTemplate(tokenizer, recipe.data.chat_template_kwargs, locates=False).render(ASKING)
    key, _, value = line.partition("chat_template_kwargs: {")[2].partition("}")[0].partition(": ")
    assert key == words
    clock("2031-05-01")
    fixed = _Recipe({key: value.strip('"')})
    assert dates.fix_day(fixed, tokenizer) == []
    assert ChatTemplate(tokenizer, fixed.data.chat_template_kwargs, locates=False).render(ASKING) == today
    assert ChatTemplate(tokenizer, locates=False).render(ASKING) != today


def test_a_template_that_does_not_ask_is_left_alone(clock):
    recipe = _Recipe()
    assert dates.fix_day(recipe, tokenizer_for("{% for m in messages %}{{ m.content }}{% endfor %}")) == []
    assert recipe.values == {} and recipe.data.chat_template_kwargs is None


def test_what_is_no_date_is_refused_or_drops_its_row():
    tokenizer = tokenizer_for(trl_template(LLAMA), "byte", eos="<|eot_id|>")
    with refused("chat_template_kwargs", "strftime_now: 'soon'"):
        ChatTemplate(tokenizer, {"strftime_now": "soon"})
    with dropped("template refuses the conversation", "strftime_now: 'soon'"):
        ChatTemplate(tokenizer).render(ASKING, strftime_now="soon")


class _Recipe:
    """What fix_day looks at."""

    def __init__(self, kwargs=None):
        self.values, self.data = {}, type("Data", (), {"chat_template_kwargs": kwargs})()
