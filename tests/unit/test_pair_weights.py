"""`weight` of a row multiplies all of its pair's loss: read and refused by name; loss and gradients by hand."""

import json

import pytest
import torch
from datasets import Dataset
from errors import dropped, refused
from tiny import CHATML, agent_rows, tokenizer_for
from trainers import close, loss_and_gradients, mdpo_trainer, trainer_of

from dpo_trainer import DPOTrainer
from mdpo.data.groups import AnswerPairs
from mdpo.data.rows import row_to_pair
from mdpo.data.tokenize import tokenize_dataset
from mdpo.forward.collators import unpacked
from mdpo.loss.metrics import COLUMNS
from mdpo.loss.registry import OF_BATCH, LossSettings, weighted
from mdpo.masking.loss_mask import RenderSettings
from mdpo.runs.run_fingerprint import pairs_digest

ROW = agent_rows(1)[0]
PLAIN = {"prompt": "2 + 2 is", "chosen": " 4", "rejected": " 5"}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def of_weights(*weights):
    return [{**row, "weight": weight} for row, weight in zip(agent_rows(len(weights)), weights, strict=True)]


@pytest.mark.parametrize("row", [ROW, PLAIN], ids=["messages", "texts"])
def test_a_weight_is_read_or_drops_its_pair(row):
    for weight in (2, 0.5, 1e-3, 1):
        assert row_to_pair({**row, "weight": weight}).weight == weight
    assert row_to_pair(row).weight is None and row_to_pair({**row, "weight": None}).weight is None
    for weight in (-1, -1e-9, float("nan"), float("inf"), 1e39, True, "2", [1.0], {}):
        with dropped("weight", json.dumps(weight)):
            row_to_pair({**row, "weight": weight})
    with dropped("weight", "is 0", "nothing is learned"):
        row_to_pair({**row, "weight": 0.0})


def test_a_dataset_keeps_weights_and_counts_those_of_none(tokenizer):
    rows = Dataset.from_list(of_weights(2.0, None, 0.0, -1.0, 0.5))
    kept, counts = tokenize_dataset(rows, tokenizer, RenderSettings(None), "a")
    assert kept["weight"] == [2.0, None, 0.5] and sorted(map(len, counts.reasons.values())) == [1, 1]
    untold, counts = tokenize_dataset(rows, tokenizer, RenderSettings(None, pair_weights=False), "a")  # as TRL does
    assert untold["weight"] == [None] * 5 and not counts.reasons
    group = {"prompt": ROW["chosen"][:1], "responses": ["a", "b", "c"], "rewards": [1, 2, 3], "weight": 0.5, "key": "g"}
    pairs, _ = tokenize_dataset(
        Dataset.from_list([group]), tokenizer, RenderSettings(None), "a", answers=AnswerPairs("all")
    )
    assert pairs["weight"] == [0.5] * 3  # each pair of the row has its weight


def test_a_resume_with_other_weights_is_another_run(tokenizer):
    def digest(*weights):
        return pairs_digest(tokenize_dataset(Dataset.from_list(of_weights(*weights)), tokenizer, RenderSettings(None),
                                             "a")[0])  # fmt: skip

    assert len({digest(None, None), digest(2.0, None), digest(None, 2.0), digest(2.0, 0.5)}) == 4


# ------------------------------------------------------------------------------------------------------------- the loss


def test_weighted_by_hand():
    losses = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert weighted(losses, None, LossSettings()) is losses
    assert weighted(losses, torch.tensor([2.0, 0.5]), LossSettings()).tolist() == [6.0, 2.0]
    for name in OF_BATCH:
        with refused("loss_type", name):
            weighted(losses, torch.ones(2), LossSettings(["sigmoid", name]))


OPTIONS = [{}, {"nll_coefficient": 0.5}, {"use_weighting": True}, {"loss_type": ["kto_pair"]}, {"ld_alpha": 0.3},
           {"loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5]}, {"shared_prefix": False}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_those_of_the_pairs_combined_by_hand(options, tmp_path, tokenizer):
    """mean(2 · L0, 0.5 · L1). kto_pair's baselines are the batch's: weights do not move them, so that the combination
    is made of one backward pass for each pair of the whole batch."""
    trainer = mdpo_trainer(tmp_path, tokenizer, of_weights(2.0, 0.5), per_device_train_batch_size=2, **options)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    weights = {row: weight for row, weight in enumerate((2.0, 0.5))}
    assert batch.pair_weight.tolist() == [weights[row] for row in batch.row.tolist()]
    assert batch.pair_weight.dtype == torch.float32
    if batch.is_packed:
        assert torch.equal(unpacked(batch, 0).pair_weight, batch.pair_weight)
    loss, gradients = loss_and_gradients(trainer, batch)

    def alone(pair: int):  # loss and gradient of one pair: the mean over two with a weight of 2, and none for the other
        one = torch.zeros(2)
        one[pair] = 2.0
        return loss_and_gradients(trainer, batch | {"pair_weight": one})

    parts = [(weight, *alone(pair)) for pair, weight in enumerate(batch.pair_weight.tolist())]
    plain = {name: x for name, x in batch.items() if name != "pair_weight"}
    trainer.compute_loss(trainer.model.train(), type(batch)(plain))
    own_losses = trainer.tables.train.pop()[:, COLUMNS.index("loss")]
    close((own_losses * batch.pair_weight).mean(), loss)
    unweighted, unweighted_gradients = loss_and_gradients(trainer, type(batch)(plain))
    for combine, wanted, wanted_gradients in (
        ([weight for weight, *_ in parts], loss, gradients),
        ([1.0, 1.0], unweighted, unweighted_gradients),  # that `alone` is a pair's own
    ):
        close(sum(w * own for w, (_, own, _) in zip(combine, parts, strict=True)) / 2, wanted)
        for name, gradient in wanted_gradients.items():
            own = sum(w * grads[name] for w, (_, _, grads) in zip(combine, parts, strict=True)) / 2
            close(own, gradient, name)
    assert abs(loss / unweighted - 1) > 1e-2  # a weight that did nothing would be seen


def test_weights_of_one_change_nothing(tmp_path, tokenizer):
    plain, ones = (mdpo_trainer(tmp_path, tokenizer, rows) for rows in (agent_rows(4), of_weights(1.0, 1, None, 1)))
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (plain, ones)]
    assert set(batches[0]) == set(batches[1]) and "pair_weight" not in batches[1]
    (loss, gradients), (same, same_gradients) = (
        loss_and_gradients(trainer, batch) for trainer, batch in zip((plain, ones), batches, strict=True)
    )
    assert torch.equal(loss, same) and all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


def test_what_is_logged_is_what_is_minimized(tmp_path, tokenizer):
    """Mean over pairs of weight · loss, in training, with accumulation too, and in evaluation; rewards are not
    weighted. At step 0 policy = reference: each loss is ln 2, so the mean is ln 2 · (2 + 0.5 + 1 + 3) / 4."""
    rows = of_weights(2.0, 0.5, None, 3.0)
    for size in (1, 4):
        steps = {"gradient_accumulation_steps": 4 // size, "max_steps": 1, "learning_rate": 1e-9}
        sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": 3}
        trainer = mdpo_trainer(tmp_path, tokenizer, rows, **steps, **sizes)
        trainer.ref_model.load_state_dict(trainer.model.state_dict())
        wanted = pytest.approx(torch.log(torch.tensor(2.0)).item() * 6.5 / 4, rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == wanted
        trainer.train()
        [log] = [log for log in trainer.state.log_history if "loss" in log]
        assert log["loss"] == wanted and log["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_losses_of_the_whole_batch_refuse_weights(tmp_path, tokenizer):
    for name in sorted(OF_BATCH):
        with refused("loss_type", name, "`weight`"):
            mdpo_trainer(tmp_path, tokenizer, of_weights(2.0, None), loss_type=[name])
        mdpo_trainer(tmp_path, tokenizer, of_weights(1.0, None), loss_type=[name])


def test_a_plain_config_does_not_read_weights(tmp_path, tokenizer):
    rows = of_weights(2.0, 0.0, float("nan"), None)
    trainer = trainer_of(DPOTrainer, rows, tmp_path, tokenizer)  # trl.DPOConfig
    assert len(trainer.train_dataset) == 4 and "pair_weight" not in next(iter(trainer.get_train_dataloader()))
