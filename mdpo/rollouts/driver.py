"""Episodes of many tasks at a time, each written down as it ends."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tqdm.auto import tqdm

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.rollouts.episode import Player
from mdpo.rollouts.options import IN_FLIGHT
from mdpo.rollouts.records import Records, Trajectory
from mdpo.rollouts.tasks import Task

BROKEN = 50  # environment errors one behind the other, after which it is not the trajectories' fault

ENVIRONMENT = "environment"  # a task's column


class Plays(Protocol):
    async def play(self, task: Task, sample: int) -> Trajectory: ...


@dataclass(frozen=True)
class ByEnvironment:
    """Plays each task in the environment that its row names."""

    players: dict[str, Player]

    async def play(self, task: Task, sample: int) -> Trajectory:
        return await self.players[task.row[ENVIRONMENT]].play(task, sample)


def jobs(tasks: list[Task], samples: int, in_flight: int = IN_FLIGHT) -> list[tuple[Task, int]]:
    """(task, sample) of each episode. As many tasks as there are places come one behind the other, then their next
    samples: by then the cache has the prompt, which samples that start together compute each for itself."""
    parts = (tasks[first : first + in_flight] for first in range(0, len(tasks), in_flight))
    return [(task, sample) for part in parts for sample in range(samples) for task in part]


def roll_out(player: Plays, wanted: list[tuple[Task, int]], records: Records, in_flight: int = IN_FLIGHT) -> None:
    """Plays those of the episodes that `records` does not have yet. Environment errors are written down when another
    episode has ended otherwise, or all have: those of an environment that is out of order for all are played again by
    the next start. Raises UserError, then too."""
    missing = records.missing(wanted)
    if records.torn:
        say(f"{records.path}: the last line, cut by a kill, is removed: its trajectory is sampled again.")
    if len(missing) < len(wanted):
        say(f"{records.path}: {len(wanted) - len(missing)} of {len(wanted)} trajectories are there already.")
    held = list[Trajectory]()
    right = [sum(t.correct for t in records.done)]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="rollouts", disable=None) as bar:

        def write() -> None:
            while held:
                records.append(held[0])
                right[0] += held.pop(0).correct
                bar.set_postfix(right=right[0], refresh=False)
                bar.update()

        def ended(trajectory: Trajectory) -> None:
            held.append(trajectory)
            if trajectory.ended != "environment error":
                write()
            elif len(held) == BROKEN:
                raise UserError(
                    f"environment: {BROKEN} trajectories, one behind the other, ended as environment error, the last "
                    f"by {trajectory.error}. They are not kept: mend it, and the same command continues.",
                    "environment",
                )

        asyncio.run(play_all(player, missing, in_flight, ended))
        write()


async def play_all(
    player: Plays, wanted: Iterable[tuple[Task, int]], in_flight: int, ended: Callable[[Trajectory], None]
) -> None:
    """Plays at most `in_flight` episodes at a time; the place of one that ends is filled at once."""
    waiting, running = iter(wanted), set[asyncio.Task]()
    try:
        while True:
            while len(running) < in_flight and (job := next(waiting, None)):
                running.add(asyncio.create_task(player.play(*job)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for episode in sorted(done, key=lambda e: e.exception() is not None):  # those that ended are kept
                ended(episode.result())
    finally:
        for episode in running:
            episode.cancel()
