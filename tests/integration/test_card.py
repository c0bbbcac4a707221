"""The model card: the end figures and the recipe of the run."""

from histories import HISTORY, evaluation
from tiny import CHATML, tokenizer_for
from trainers import mdpo_trainer

from mdpo.reporting.model_card import figures


def test_figures():
    more = {"eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.25, "eval_pairs": 8}
    turns = {"eval_margins/turn_1": 0.5, "eval_pairs/turn_1": 8, "eval_margins/turn_2": 1.0, "eval_pairs/turn_2": 6}
    turns |= {f"eval_{what}/{n}_turns": n for n in (1, 2) for what in ("accuracies", "margins", "pairs")}
    text = figures([evaluation(0, -50.0, -60.0, **more), evaluation(4, -54.0, -76.0, **more, **turns)], 0.1)
    assert text.splitlines() == [
        "| 8 held-out pairs | before | after 4 steps |",
        "|---|---:|---:|",
        "| loss | 0.5000 | 0.5000 |",
        "| reward accuracy | 0.7500 | 0.7500 |",
        "| mean reward margin | 1.2500 | 1.2500 |",
        "| log-probs chosen | -50.0000 | -54.0000 |",
        "| log-probs rejected | -60.0000 | -76.0000 |",
        "",
        "| turn (held-out pairs at step 4) | margin | pairs |",
        "|---|---:|---:|",
        "| 1 | 0.5000 | 8 |",
        "| 2 | 1.0000 | 6 |",
        "",
        "| turns of the chosen side (held-out pairs at step 4) | accuracy | margin | pairs |",
        "|---|---:|---:|---:|",
        "| 1 | 1.0000 | 1.0000 | 1 |",
        "| 2 | 2.0000 | 2.0000 | 2 |",
        "",
        "Log-probs of the chosen side fell by 4.00 nats a pair (held-out pairs, -50.00 at step 0, -54.00 at step 4); "
        "rejected fell by 16.00.",
    ]
    assert figures(HISTORY[1:3], 0.1) == "Training loss 0.6000 at step 2; no held-out pairs were evaluated."
    assert figures([], 0.1) == ""


def test_a_card_with_figures_and_recipe(tmp_path):
    trainer = mdpo_trainer(tmp_path, tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    folder = tmp_path / "dpo_trainer"
    trainer.create_model_card()
    assert (
        "## Metrics" not in (folder / "README.md").read_text() and "## Recipe" not in (folder / "README.md").read_text()
    )
    (folder / "recipe_resolved.yaml").write_text("beta: 0.05  # {{ beta }}\n")
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    card = (folder / "README.md").read_text()
    assert "```yaml\nbeta: 0.05  # {{ beta }}\n```" in card
    assert f"| loss | {trainer.state.log_history[-1]['eval_loss']:.4f} |" in card and "| 8 held-out pairs |" in card
