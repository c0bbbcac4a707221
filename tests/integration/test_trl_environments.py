"""The same classes in TRL's GRPOTrainer, installed, and here: tools, their schemas and where rewards come from."""

import pytest
from datasets import Dataset
from tiny import tiny_llama, tokenizer_for, trl_template
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from mdpo.rollouts.environment import Environments, environments_of
from mdpo.rollouts.shop import Shop


class Diary:
    """As TRL's documentation has one: an async tool, a private method, a property that must not be evaluated."""

    def reset(self, **row) -> str | None:
        self.lines: list[str] = []
        return None

    @property
    def broken(self):
        raise RuntimeError("evaluated")

    async def write(self, line: str, times: int = 1) -> str:
        """
        Writes a line into the diary.

        Args:
            line: What is written.
            times: How often.
        """
        self.lines += [line] * times
        return f"{self._count()} lines"

    def read(self) -> list[str]:
        """
        Reads the diary.
        """
        return self.lines

    def _count(self) -> int:
        return len(self.lines)


class Judged(Diary):
    async def get_reward(self) -> float:
        return float(len(self.lines))


def grpo(tmp_path, factory, **more) -> GRPOTrainer:
    tokenizer = tokenizer_for(trl_template("qwen3"), "byte")
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=2, num_generations=2, report_to="none", use_cpu=True,
                      bf16=False)  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi."}], "environment": "one"}] * 2)
    return GRPOTrainer(tiny_llama(tokenizer, seed=0), args=args, train_dataset=rows, processing_class=tokenizer,
                       environment_factory=factory, **more)  # fmt: skip


def constant(completions, **row) -> list[float]:
    return [0.5] * len(completions)


@pytest.mark.parametrize(("kind", "rewards"), [(Shop, []), (Judged, []), (Diary, [constant]), (Judged, [constant])])
def test_a_class_has_the_same_tools_and_rewards(tmp_path, kind, rewards):
    theirs, ours = grpo(tmp_path, kind, reward_funcs=list(rewards) or None), Environments(kind)
    schemas = {tool.__name__: get_json_schema(tool) for tool in theirs.tools}
    assert ours.schemas == schemas and schemas
    names = [f.__name__ for f in rewards] + [kind.__name__] * ours.has_reward
    assert theirs.reward_func_names == names


def test_several_classes_are_told_apart_by_their_rows(tmp_path):
    factories = {"one": Shop, "two": Judged}
    theirs, ours = grpo(tmp_path, factories), environments_of(factories, [])
    for name in factories:
        assert list(ours[name].schemas) == [tool.__name__ for tool in theirs._env_tools[name]]
