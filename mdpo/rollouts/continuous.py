"""A model's turns by transformers' continuous batching: requests join and leave the batch at any token, as many as the
cache's memory holds, and a conversation's next prompt finds its beginning in the cache."""

import asyncio
import itertools
from contextlib import ExitStack

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from mdpo.errors import UserError
from mdpo.rollouts.by_conversation import attention_by_conversation
from mdpo.rollouts.episode import Sampled

ALIVE_S = 5.0  # how often a waiting turn looks whether the thread of generation is still there
PAGE, CPU_PAGE = 32, 8  # tokens; what fills no page of a prompt is computed again in the next one
CPU_SHARE = 0.25  # of the memory that is free, for the cache on a CPU
CPU_TOKENS = 1 << 16  # of the cache on a CPU, at most: an attention mask has as many columns
CPU_BATCH_TOKENS = 512  # computed at a time on a CPU: prompts join in parts of that size


class ContinuousBatching:
    """In use as a context. `share` of a CPU's memory is there for this process. Raises UserError for a model that
    transformers cannot batch so."""

    def __init__(self, model, config: GenerationConfig, seed: int = 42, share: float = 1.0):
        self.model, self.config, self.stops = model.eval(), config, set(config.eos_token_id)
        self.options = {"page_size": PAGE, "seed": seed, "return_logprobs": True}
        if model.device.type == "cpu":
            pages = {"page_size": CPU_PAGE, "num_blocks": _cpu_blocks(model, share)}
            self.options |= {**pages, "max_batch_tokens": CPU_BATCH_TOKENS}
        self._numbers, self._attention = itertools.count(), ExitStack()

    def __enter__(self) -> "ContinuousBatching":
        if self.model.device.type == "cpu":
            self._attention.enter_context(attention_by_conversation())
        try:
            self.manager = self.model.init_continuous_batching(
                generation_config=self.config, continuous_batching_config=ContinuousBatchingConfig(**self.options)
            )
            self.manager.start()
        except (ValueError, NotImplementedError, AttributeError) as error:
            self._attention.close()
            raise UserError(f"backend: transformers cannot batch this model continuously: {error}.") from error
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:  # nobody waits for what is under way
            self.manager.output_router.result_handlers.clear()
        self.manager.stop(block=True, hard_stop=kind is not None)
        self._attention.close()

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        """Raises UserError where generation fails."""
        loop, name = asyncio.get_running_loop(), f"turn-{next(self._numbers)}"
        future: asyncio.Future = loop.create_future()
        self.manager.register_result_handler(name, lambda output: future.done() or future.set_result(output))
        self.manager.add_request(
            prompt, request_id=name, max_new_tokens=max_new_tokens, eos_token_id=list(self.config.eos_token_id)
        )
        while not (await asyncio.wait([future], timeout=ALIVE_S))[0]:
            if not self.manager.is_running():
                raise UserError("backend: generation has stopped; its error is above.")
        output = future.result()
        if output.error or not output.generated_tokens:
            raise UserError(f"backend: generation failed: {output.error or 'no token came back'}.")
        ids = list(output.generated_tokens)
        return Sampled(ids, cut=ids[-1] not in self.stops, logprobs=list(output.logprobs) or None)


def _cpu_blocks(model: torch.nn.Module, share: float) -> int:
    """Pages of the cache on a CPU; on a GPU transformers measures what there is room for."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * torch.finfo(model.dtype).bits // 8
    return max(min(int(psutil.virtual_memory().available * CPU_SHARE * share) // token, CPU_TOKENS) // CPU_PAGE, 8)
