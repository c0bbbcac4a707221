"""A process that generates for another one (`processes.py`): python -m mdpo.rollouts.process_child DESCRIPTOR NUMBER"""

import asyncio
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import torch
from transformers.utils.logging import disable_progress_bar

from mdpo.console import first_line, speak_on_any_terminal
from mdpo.errors import UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.rollouts.episode import Backend, Sampled
from mdpo.rollouts.sampling import loaded


def main(descriptor: int, number: int) -> None:
    speak_on_any_terminal()
    if number:
        disable_progress_bar()
    pipe = Connection(descriptor)
    try:
        checkpoint, recipe, options, seed, precision = pipe.recv()
        torch.backends.fp32_precision = precision  # what `tf32` of a recipe sets
        tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
        template = ChatTemplate(tokenizer, recipe.data.chat_template_kwargs)
        with loaded(checkpoint, recipe, template, options, seed) as (backend, stops, context):
            pipe.send((stops, context))
            asyncio.run(serve(pipe, backend))
    except UserError as error:
        pipe.send(error)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # whatever threads there are


async def serve(pipe: Connection, backend: Backend) -> None:
    """Never returns; with the other end of the pipe the process ends."""
    loop, asked = asyncio.get_running_loop(), asyncio.Queue[tuple[int, list[int], int]]()

    def read() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(asked.put_nowait, pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    async def answer(number: int, prompt: list[int], max_new_tokens: int) -> None:
        found: Sampled | UserError
        try:
            found = await backend.sample(prompt, max_new_tokens)
        except UserError as error:
            found = error
        except Exception as error:
            found = UserError(f"backend: {type(error).__name__}: {first_line(error)}.", "backend")
        pipe.send((number, found))

    threading.Thread(target=read, daemon=True).start()
    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(answer(*await asked.get()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
