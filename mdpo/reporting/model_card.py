"""The model card beside a checkpoint: what it was trained from and on, with which objective, its metrics, recipe and
versions."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mdpo.reporting.log_history import before_and_after, chosen_logps, curve, latest_turns
from mdpo.reporting.run_report import RESOLVED, SHOWN
from mdpo.reporting.turn_tables import turn_tables

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if base %}Fine-tuned from [{{ base }}](https://huggingface.co/{{ base }}){% else %}Fine-tuned from a local model\
{% endif %}{% if dataset %} on [{{ dataset }}](https://huggingface.co/datasets/{{ dataset }}){% endif %} by Direct \
Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)){% if turn_masks %} over the tokens that \
the policy itself produced, as in multi-turn M-DPO ([arXiv 2409.02392](https://arxiv.org/abs/2409.02392)){% endif %}.

Loss: {{ loss }}, β = {{ beta }}.

{% if figures %}## Metrics

{{ figures }}

{% endif %}{% if recipe %}## Recipe

```yaml
{{ recipe }}
```

{% endif %}Versions: {{ versions }}.
"""


def write_card(
    folder: str,
    name: str,
    base: str | None,
    dataset: str | None,
    tags: list[str],
    args,
    history: list[dict[str, Any]],
) -> None:
    """README.md in `folder`. A base model that is a local folder is not linked to."""
    base = base if base and not Path(base).is_dir() else None
    data = ModelCardData(
        base_model=base,
        datasets=dataset,
        library_name="transformers",
        model_name=name,
        tags=["generated_from_trainer", *tags],
    )
    recipe = Path(folder, RESOLVED)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        base=base,
        dataset=dataset,
        turn_masks=args.mask_user_turns,
        loss=" + ".join(args.loss_type),
        beta=args.beta,
        figures=figures(history, args.beta),
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.exists() else "",
        versions=", ".join(f"{p} {version(p)}" for p in ("trl", "transformers", "torch", "datasets", "tokenizers")),
    )
    card.save(str(Path(folder, "README.md")))


def figures(history: list[dict[str, Any]], beta: float) -> str:
    """Markdown: held-out metrics before and after, or training's last loss; by turn; the chosen side's log-probs."""
    before, after = before_and_after(history)
    parts, loss = [], curve(history, "loss").training
    if after:
        columns = {"before": before, f"after {after['step']} steps": after} if before else {"after": after}
        rows = [[f"{int(after['eval_pairs'])} held-out pairs", *columns]]
        rows += [[name, *(f"{log[key]:.4f}" for log in columns.values())] for name, key in SHOWN if key in after]
        parts.append(_table(rows))
    elif loss:
        parts.append(f"Training loss {loss[-1][1]:.4f} at step {loss[-1][0]}; no held-out pairs were evaluated.")
    which, names = latest_turns(history)
    by_turn, by_number = turn_tables(names).values()
    if len(by_turn) > 1:
        rows = [[f"turn ({which})", "margin", "pairs"]]
        parts.append(_table(rows + [[str(r["turn"]), f"{r['margins']:.4f}", f"{r['pairs']:.0f}"] for r in by_turn]))
    if len(by_number) > 1:
        rows = [[f"turns of the chosen side ({which})", "accuracy", "margin", "pairs"]]
        rows += [
            [str(r["turns"]), f"{r['accuracies']:.4f}", f"{r['margins']:.4f}", f"{r['pairs']:.0f}"] for r in by_number
        ]
        parts.append(_table(rows))
    line, _ = chosen_logps(history, beta)
    return "\n\n".join([*parts, line[:1].upper() + line[1:]]).strip()


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])
