"""A model's turns by transformers' `generate`, in rounds: all that wait are one padded batch, and none joins it until
the longest has ended. The reference implementation of `continuous.py`, for models that cannot be batched so."""

import asyncio

import torch
from transformers import GenerationConfig

from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.turns import sampling_stops
from mdpo.rollouts.episode import Sampled

ROUND = 8  # turns of a batch, at most


def context_length(config) -> int | None:
    """The tokens that a model's positions reach; None where its configuration has no limit."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def stop_ids(config: GenerationConfig | None, template: ChatTemplate) -> set[int]:
    """Tokens that end a turn: the template's own and those of the model's configuration."""
    ids = set(template.tokenizer.convert_tokens_to_ids(sorted(sampling_stops(template))))
    configured = getattr(config, "eos_token_id", None)
    ids |= set(configured if isinstance(configured, list) else [configured])
    return ids - {None}


def sampling_config(stops: set[int], pad: int | None, temperature: float) -> GenerationConfig:
    """In place of the model's own, whose defaults would be filled in: many ship a top_p or a repetition penalty. Greedy
    at temperature 0."""
    sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    return GenerationConfig(
        do_sample=bool(temperature),
        eos_token_id=sorted(stops),
        pad_token_id=min(stops) if pad is None else pad,
        **sampling,
    )


class Rounds:
    """In use as a context, within a running loop. At most `batch_size` turns are one batch."""

    def __init__(self, model, config: GenerationConfig, seed: int = 42, batch_size: int = ROUND):
        self.model, self.config, self.batch_size = model.eval(), config, batch_size
        torch.manual_seed(seed)
        model.generation_config = config
        self._waiting: list[tuple[list[int], int, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *_) -> None:
        self._worker = None

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, max_new_tokens, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._rounds())
        return await future

    async def _rounds(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # whoever is ready joins
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            try:
                found = await asyncio.to_thread(self._generate, [p for p, _, _ in batch], max(n for _, n, _ in batch))
            except Exception as error:
                for _, _, future in batch:
                    future.done() or future.set_exception(error)
                continue
            for (_, limit, future), ids in zip(batch, found, strict=True):
                future.done() or future.set_result(self._sampled(ids[:limit]))

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], limit: int) -> list[list[int]]:
        """Padded on the left, so that the new tokens of all rows are in the same columns."""
        longest, pad = max(map(len, prompts)), self.config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        rows = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit)
        return rows[:, longest:].tolist()

    def _sampled(self, ids: list[int]) -> Sampled:
        end = next((t for t, token in enumerate(ids, 1) if token in self.config.eos_token_id), None)
        return Sampled(ids[:end], cut=end is None)


def refuse_hidden_tool_role(template: ChatTemplate, role: str) -> None:
    """Raises UserError where the template does not show a message of that role after the assistant's."""
    turns = [("user", "Qz0"), ("assistant", "Qz1"), (role, "Qz2")]
    try:
        text = template.render([{"role": name, "content": content} for name, content in turns], generation=True)
    except DropPair as error:
        raise UserError(f"--tool_role: {role}: {error}") from error
    if "Qz2" not in text:
        raise UserError(f"--tool_role: the chat template leaves out messages of the role {role!r}. Take another one.")
