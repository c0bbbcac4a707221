"""Five training losses of tiny models as literal numbers, for each layout of a batch and each place of the reference.

Other tests compare two paths with each other; these would see a change that moves both. The losses were measured on one
thread of a CPU in float32. Layouts in one entry of PINNED differ from each other by at most 2e-6 there; other machines
round otherwise (an EPYC by 3.6e-5, before and after the token forest), so 1e-4 is allowed. The last test shows that one
percent of the learning rate makes more than that.
"""

import pytest
from peft import LoraConfig
from tiny import CHATML, agent_rows, tiny_mixtral, tokenizer_for
from trainers import trainer_of
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.config import MDPOConfig

TOLERANCE = 1e-4
PADDED, AHEAD = {"shared_prefix": False}, {"precompute_ref_log_probs": True}
TWICE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "gaussian"}
PINNED = {  # what is computed: (losses, {layout: options})
    "turn masks": (
        [0.650946, 0.874169, 0.369872, 0.159660, 0.290468],
        {
            "packed": {},
            "padded": PADDED,
            "packed, reference precomputed": AHEAD,
            "padded, reference precomputed": {**PADDED, **AHEAD},
            "packed, two micro-batches": TWICE,
            "padded, two micro-batches": {**PADDED, **TWICE},
            "packed, checkpointing": {"gradient_checkpointing": True},
            "padded, checkpointing": {**PADDED, "gradient_checkpointing": True},
        },
    ),
    "no turn masks": (
        [1.063384, 1.242788, 0.464438, 0.171709, 0.355668],
        {"packed": {"mask_user_turns": False}, "padded": {**PADDED, "mask_user_turns": False}},
    ),
    "RPO's term": (
        [8.429654, 8.290348, 7.779406, 7.345203, 7.266459],
        {"packed": {"nll_coefficient": 1.0}, "padded": {**PADDED, "nll_coefficient": 1.0}},
    ),
    "a plain DPOConfig": (
        [1.253598, 1.142544, 0.293359, 0.374328, 0.133464],
        {"padded": {"config": DPOConfig}, "padded, reference precomputed": {"config": DPOConfig, **AHEAD}},
    ),
    "LoRA": (
        [0.650946, 1.123082, 0.471373, 0.341561, 0.776506],
        {"packed": {"peft_config": LORA}, "padded": {**PADDED, "peft_config": LORA}},
    ),
    "a mixture of experts": (
        [0.926853, 0.437621, 0.669569, 0.238765, 0.237935],
        {"packed": {"models": tiny_mixtral}, "padded": {**PADDED, "models": tiny_mixtral}},
    ),
}
CASES = [(what, layout) for what, (_, layouts) in PINNED.items() for layout in layouts]


def losses(folder, config=MDPOConfig, peft_config=None, models=None, **options) -> list[float]:
    """Of five steps of four pairs, on twelve pairs, from a policy that is not its reference."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    if models is not None:
        options["models"] = lambda: (models(tokenizer, seed=0), models(tokenizer, seed=1))
    options["peft_config"] = peft_config and LoraConfig(**peft_config)
    trainer = trainer_of(DPOTrainer, agent_rows(12), folder, tokenizer, config, max_steps=5, **options)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("what", "layout"), CASES, ids=[f"{what}, {layout}" for what, layout in CASES])
def test_five_losses(what, layout, tmp_path):
    pinned, layouts = PINNED[what]
    assert losses(tmp_path, **layouts[layout]) == pytest.approx(pinned, abs=TOLERANCE)


def test_a_percent_of_the_learning_rate_would_be_seen(tmp_path):
    """The first loss is of no step yet; every later one moves by more than is allowed."""
    pinned, _ = PINNED["turn masks"]
    first, *later = losses(tmp_path, learning_rate=1.01e-3)
    assert first == pytest.approx(pinned[0], abs=TOLERANCE)
    assert all(abs(found - wanted) > TOLERANCE for found, wanted in zip(later, pinned[1:], strict=True))
