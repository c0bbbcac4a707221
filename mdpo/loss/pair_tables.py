"""Per-pair metrics that are not logged yet, of this rank."""

from collections.abc import Iterable

import torch

from mdpo.loss.health import HEALTH
from mdpo.loss.metrics import COLUMNS
from mdpo.loss.turn_metrics import pad_and_cat
from mdpo.ranks import first_of_row
from mdpo.types import PairBatch

FINITE = slice(COLUMNS.index("loss"), COLUMNS.index("rejected_logps") + 1)  # columns that show a pair at fault
ROW = COLUMNS.index("row")
OF_OLDER = COLUMNS.index(HEALTH[0])  # columns of checkpoints that do not say how many they have


class PairTables:
    """One table (B, len(COLUMNS) + 4T) of `mdpo.loss.metrics.pair_table` for each micro-batch: `train` since the last
    log, `eval` of the evaluation in hand; `tokens` of all sequences that this rank has trained on since the start, and
    of packed batches `distinct` ones, those that sequences begin with alike once. On `device`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.train: list[torch.Tensor] = []
        self.eval: list[torch.Tensor] = []
        self.tokens = self.distinct = 0
        self._earlier = 0  # how many of `train` belong to steps that are over

    def append(self, table: torch.Tensor, training: bool, batch: PairBatch) -> None:
        counts = first_of_row()  # of a row that ranks share they all have this table
        (self.train if training else self.eval).append(table if counts else table[:0])
        if training and counts:
            self.tokens += batch.n_tokens
            self.distinct += batch.input_ids.numel() if batch.is_packed else 0

    def end_step(self) -> None:
        """The step in hand is over; its tables wait for the log."""
        self._earlier = len(self.train)

    def drop_step(self) -> torch.Tensor:
        """Takes out the pairs of the step in hand, as one table in the CPU's memory."""
        tables, self.train = self.train[self._earlier :], self.train[: self._earlier]
        return pad_and_cat(tables).cpu()

    def take_train(self) -> list[torch.Tensor]:
        """The tables of training since the last call."""
        taken, self.train, self._earlier = self.train, [], 0
        return taken

    def take_eval(self) -> torch.Tensor:
        """The evaluated pairs since the last call, as one table."""
        taken, self.eval = self.eval, []
        return pad_and_cat(taken)

    def state_dict(self) -> dict:
        columns = len(COLUMNS)
        return {"train": self.train, "tokens": self.tokens, "distinct": self.distinct, "columns": columns}

    def load_state_dict(self, state: dict) -> None:
        columns = state.get("columns", OF_OLDER)
        self.train = [_with_columns(table, columns).to(self.device) for table in state["train"]]
        self._earlier, self.tokens = len(self.train), state["tokens"]
        self.distinct = state.get("distinct", 0)  # older checkpoints lack it


def rows_of(table: torch.Tensor) -> list[int]:
    """The pairs' numbers in their dataset."""
    return table[:, ROW].long().tolist()


def rows_at_fault(table: torch.Tensor) -> list[int]:
    """The pairs whose loss, rewards or log-probs are NaN or Inf."""
    finite: Iterable[bool] = table[:, FINITE].isfinite().all(1).tolist()
    return [row for row, good in zip(rows_of(table), finite, strict=True) if not good]


def _with_columns(table: torch.Tensor, columns: int) -> torch.Tensor:
    """A table of an older checkpoint, whose first `columns` are not by turn, with those that it lacks as NaN: so their
    figures are in the next log, rather than means over a part of its steps."""
    lacking = table.new_full((len(table), len(COLUMNS) - columns), torch.nan)
    return torch.cat([table[:, :columns], lacking, table[:, columns:]], 1)
