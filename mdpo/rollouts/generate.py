"""A model's next turns, by transformers' `generate`: `Generator(...)(conversations)` -> a Reply each."""

import torch
from transformers import GenerationConfig

from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.spans import tokenize
from mdpo.rollouts.loop import Reply
from mdpo.types import Message


class Generator:
    """Greedy at temperature 0. `max_new_tokens` limits a turn; a conversation that leaves less room than that in
    the model's context is "too long", whatever else is in its batch. Raises UserError."""

    def __init__(self, model, tokenizer, template: ChatTemplate, max_new_tokens: int, temperature: float = 0.0):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template
        self.max_new_tokens = max_new_tokens
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if self.context and max_new_tokens >= self.context:
            raise UserError(f"--max_new_tokens: {max_new_tokens} leaves no room in a context of {self.context} tokens.")
        self.stops = stop_ids(model, template)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.stops)
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        # Replaces the model's own, whose defaults `generate` would fill in: many ship a top_p or a repetition penalty.
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            eos_token_id=sorted(self.stops),
            pad_token_id=self.pad,
            **sampling,
        )

    def __call__(self, conversations: list[list[Message]]) -> list[Reply]:
        prompts = [self.prompt(messages) for messages in conversations]
        fitting = [i for i, ids in enumerate(prompts) if self.fits(ids)]
        texts = dict(zip(fitting, self._generate([prompts[i] for i in fitting]), strict=True))
        return [texts.get(i, Reply("", "too long")) for i in range(len(prompts))]

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the conversation and the generation prompt, by the template and tokenizer that training uses."""
        try:
            return tokenize(self.template.render(messages, generation=True), self.tokenizer)[0]
        except DropPair as reason:
            raise UserError(
                f"{reason} (its messages: {', '.join(m['role'] for m in messages)}).", reason.key
            ) from reason

    def fits(self, ids: list[int]) -> bool:
        return self.context is None or len(ids) + self.max_new_tokens <= self.context

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]]) -> list[Reply]:
        """Padded on the left, so that the new tokens of all rows are in the same columns."""
        if not prompts:
            return []
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        replies = self.model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
        return [self._reply(row) for row in replies]

    def _reply(self, ids: list[int]) -> Reply:
        end = next((t for t, token in enumerate(ids) if token in self.stops), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Reply(text, "cut" if end is None else "turn")


def stop_ids(model, template: ChatTemplate) -> set[int]:
    """Tokens that end a turn: the template's own, which end masks too, and those of the model's configuration."""
    ids = set(template.tokenizer.convert_tokens_to_ids(sorted(template.stops)))
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids |= set(configured if isinstance(configured, list) else [configured])
    return ids - {None}


def refuse_hidden_tool_role(template: ChatTemplate, role: str) -> None:
    """Raises UserError where the template does not show a message of that role after the assistant's."""
    turns = [("user", "Qz0"), ("assistant", "Qz1"), (role, "Qz2")]
    try:
        text = template.render([{"role": name, "content": content} for name, content in turns], generation=True)
    except DropPair as error:
        raise UserError(f"--tool_role: {role}: {error}") from error
    if "Qz2" not in text:
        raise UserError(f"--tool_role: the chat template leaves out messages of the role {role!r}. Take another one.")
