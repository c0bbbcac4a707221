"""A side's messages as its chat template writes them, whole or up to a turn, with and without sentinels."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.sentinels import NOT_DERIVABLE, Marks, SentinelInserter, fresh_nonces
from mdpo.types import Message


@dataclass
class Marked:
    """A rendered text and where its messages are: `marks` have its sentinels, `messages` those with sentinels in them,
    which `marker` put there. `text` is without any."""

    text: str
    messages: list[Message]
    marker: SentinelInserter
    marks: Marks

    def behind(self, i: int) -> int:
        """Where the content before message `i` ends, in characters of `text`."""
        return self.marks.unmarked(self.marks.end_before(i))

    def content_end(self, i: int) -> int:
        """Where the content of message `i` ends."""
        return self.marks.unmarked(self.marks.end_of(i))


@dataclass
class Conversation:
    """A side's messages and the template that writes them; those before `n_prompt` are context."""

    messages: list[Message]
    n_prompt: int
    template: ChatTemplate
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def trained(self) -> list[int]:
        """The assistant messages that are trained on."""
        roles = [m["role"] for m in self.messages]
        return [i for i, role in enumerate(roles) if i >= self.n_prompt and role == "assistant"]

    @cached_property
    def text(self) -> str:
        """All messages as the template writes them. Raises DropPair where it refuses them."""
        return self.render(self.messages)

    def render(self, messages: list[Message], generation: bool = False) -> str:
        return self.template.render(messages, self.tools, generation, **self.kwargs)

    @cached_property
    def whole(self) -> Marked:
        return self.mark(self.messages, self.text)

    def mark(self, messages: list[Message], text: str, generation: bool = False) -> Marked:
        """Where the messages are in the `text` that the template writes of them: the marked text, without its
        sentinels, has to be the same one. Raises DropPair where the template looks at what it writes."""
        nonce, marks = next(fresh_nonces(text)), None
        for inside in (False, True):
            marker = SentinelInserter(nonce, inside)
            marked = [marker.message(m, i) for i, m in enumerate(messages)]
            try:
                marks = Marks(self.render(marked, generation), marker)
            except DropPair:
                continue
            if marks.plain == text:
                return Marked(text, marked, marker, marks)
        raise DropPair(f"{NOT_DERIVABLE}: the template rewrites {marks.owner(text) if marks else 'marked text'}")

    def prompt(self, i: int) -> Marked:
        """What the model was given for message `i`: the messages before it and the generation prompt."""
        before = self.messages[:i]
        return self.mark(before, self.render(before, generation=True), generation=True)

    def prompt_of_whole(self, i: int) -> Marked:
        """The same by one rendering, of the whole's marked messages: right where it is what `whole` begins with."""
        whole = self.whole
        marks = Marks(self.render(whole.messages[:i], generation=True), whole.marker)
        return Marked(marks.plain, whole.messages[:i], whole.marker, marks)

    def up_to(self, i: int) -> Marked:
        """The messages up to message `i` as the template writes them, where that is the last one."""
        if i + 1 == len(self.messages):
            return self.whole
        return self.mark(self.messages[: i + 1], self.render(self.messages[: i + 1]))
