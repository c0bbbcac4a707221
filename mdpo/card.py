"""The model card beside a checkpoint: what it was trained from and on, with which objective and versions."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if base %}Fine-tuned from [{{ base }}](https://huggingface.co/{{ base }}){% else %}Fine-tuned from a local model\
{% endif %}{% if dataset %} on [{{ dataset }}](https://huggingface.co/datasets/{{ dataset }}){% endif %} by Direct \
Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)){% if turn_masks %} over the tokens that \
the policy itself produced, as in multi-turn M-DPO ([arXiv 2409.02392](https://arxiv.org/abs/2409.02392)){% endif %}.

Loss: {{ loss }}, β = {{ beta }}.

Versions: {{ versions }}.
"""


def write_card(folder: str, name: str, base: str | None, dataset: str | None, tags: list[str], args) -> None:
    """README.md in `folder`. A base model that is a local folder is not linked to."""
    base = base if base and not Path(base).is_dir() else None
    data = ModelCardData(
        base_model=base,
        datasets=dataset,
        library_name="transformers",
        model_name=name,
        tags=["generated_from_trainer", *tags],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        base=base,
        dataset=dataset,
        turn_masks=getattr(args, "mask_user_turns", False),
        loss=" + ".join(args.loss_type),
        beta=args.beta,
        versions=", ".join(f"{p} {version(p)}" for p in ("trl", "transformers", "torch", "datasets", "tokenizers")),
    )
    card.save(str(Path(folder, "README.md")))
