"""A log history by hand."""

import math


def evaluation(step, chosen, rejected, **more):
    return {"eval_loss": 0.5, "eval_logps/chosen": chosen, "eval_logps/rejected": rejected, "step": step, **more}


HISTORY = [
    evaluation(0, -50.0, -60.0, **{"eval_margins/turn_1": 0.0, "eval_pairs/turn_1": 8}),
    {"loss": 0.69, "grad_norm": math.nan, "learning_rate": 1e-5, "step": 1, "margins/turn_1": 0.1, "pairs/turn_1": 4},
    {"loss": 0.60, "grad_norm": 3.0, "learning_rate": 2e-5, "step": 2, "margins/turn_1": 0.2, "pairs/turn_1": 4},
    evaluation(2, -53.0, -75.0),
    evaluation(2, -54.0, -76.0, **{"eval_margins/turn_1": 1.5, "eval_pairs/turn_1": 8}),  # once more at the end
    {"train_loss": 0.645, "train_runtime": 3.0, "step": 2},
]
