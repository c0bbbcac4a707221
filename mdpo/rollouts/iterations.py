"""Iterative preference learning: a policy samples, its trajectories are paired, it is trained on the pairs and judged
on held-out tasks, again and again. Each stage is a command that can be run by hand, and a folder that is whole when
`stage.json` is in it: the same loop, started again, continues in the stage that it was in."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mdpo.config.loop import Loop
from mdpo.console import say
from mdpo.errors import Preempted, UserError
from mdpo.rollouts.environment import code_files
from mdpo.rollouts.options import OF_RECIPE, OF_SERVERS, SERVED, flags, keys
from mdpo.rollouts.sft_recipe import last_checkpoint, sft_values
from mdpo.rollouts.stage_figures import stage_figures
from mdpo.rollouts.tables import wilson
from mdpo.runs.checkpoints import newest_complete
from mdpo.runs.preemption import EXIT_CODE, end_with_parent
from mdpo.storage import replace_text

ROOT = Path(__file__).resolve().parents[2]
DONE, BEGUN = "stage.json", "begun.json"
CONTENTS = "contents"  # of the files that a finished stage has read
OF_LAUNCH = ("num_processes", "mixed_precision")  # of an accelerate file: the batch, and its precision
NO_LIMIT = 2**31 - 1  # tokens: TRL's own max_length would cut at 1024
SHUTDOWN_S = "600"  # that the launcher leaves its processes for a step and a checkpoint; torch's own are 30
MODEL = "model"
TRAJECTORIES, PAIRS = "trajectories.jsonl", "pairs.jsonl"


@dataclass(frozen=True)
class Stage:
    """One command. `settings` are what its result depends on: a finished stage of other settings is refused; of
    `files`, which it reads, other contents are said. `anew` is what an interrupted start may have left and the command
    would refuse; `late` are words that are asked for when it runs."""

    folder: Path
    words: list[str]
    settings: dict[str, Any]
    anew: Path | None = None
    strict: bool = False  # an interrupted start of other settings is refused too: the command would mix them
    late: Callable[[], list[str]] = list
    files: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*self.words, *self.late()]

    def begun(self) -> None:
        """Writes down with which settings the command begins. Raises UserError where it had begun with others."""
        self._refuse_others(BEGUN, "was begun", "Take them back, or remove the folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / BEGUN, json.dumps(self.settings, indent=1))

    def finished(self) -> bool:
        """Raises UserError where the folder is whole, but of other settings."""
        return self._refuse_others(DONE, "is finished", "Take them back, or give another output_dir")

    def _refuse_others(self, file: str, what: str, advice: str) -> bool:
        """Whether the file is there."""
        if not (self.folder / file).exists():
            return False
        theirs = json.loads((self.folder / file).read_text(encoding="utf-8"))
        theirs.pop(CONTENTS, None)
        changed = sorted(k for k in theirs.keys() | self.settings.keys() if theirs.get(k) != self.settings.get(k))
        if changed:
            raise UserError(f"{self.folder}: {what}, with other values of {', '.join(changed)}. {advice}.", changed[0])
        return True

    def edited(self) -> list[str]:
        """The files that have been edited since a finished stage read them."""
        theirs = json.loads((self.folder / DONE).read_text(encoding="utf-8")).get(CONTENTS, {})
        return sorted(path for path, digest in contents_of(tuple(theirs)).items() if digest != theirs[path])

    def run(self) -> None:
        """Raises UserError where the command fails, Preempted where it was asked to stop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.strict:
            self.begun()
        if self.anew:
            for path in (self.anew, *self.folder.glob(".merge-*")):
                shutil.rmtree(path, ignore_errors=True)
        command, contents = self.command, contents_of(self.files)
        say(f"{self.folder}: {shlex.join(command)}")
        own = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_S, **os.environ}
        process = subprocess.Popen(command, preexec_fn=end_with_parent, env=own)  # noqa: PLW1509
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code == EXIT_CODE:
            raise Preempted("its command")
        if code:
            raise UserError(f"{self.folder}: its command ended with {code}; its error is above.", "stage")
        self.finish(contents)

    def finish(self, contents: dict[str, str]) -> None:
        """Writes down that the folder is whole, and what the command read."""
        replace_text(self.folder / DONE, json.dumps({**self.settings, CONTENTS: contents}, indent=1))


def contents_of(files: tuple[str, ...]) -> dict[str, str]:
    """A digest of each file; "" of one that is not there."""
    paths = {file: Path(file) for file in files}
    return {f: xxhash.xxh3_64_hexdigest(path.read_bytes()) if path.is_file() else "" for f, path in paths.items()}


class Iterations:
    """The stages of a loop in order; each is made from the results of those before. With `adapters` training writes
    LoRA adapters, which are merged. SFT and pairs take trajectories of `max_length` tokens at most. `keys` are those of
    the recipe and of `train` that results depend on."""

    def __init__(self, loop: Loop, first_policy: str, adapters: bool = False, max_length: int | None = None,
                 keys: dict[str, Any] | None = None):  # fmt: skip
        self.loop, self.given, self.adapters, self.max_length = loop, first_policy, adapters, max_length
        self.keys = keys or {}
        self.out = Path(loop.output_dir)

    def folder(self, n: int, stage: str) -> Path:
        return self.out / f"iteration-{n}" / stage

    def policy(self, n: int) -> str:
        """The policy that iteration `n` ends with; of 0 the first one that samples."""
        if n:
            return str(self.folder(n, "merge") / MODEL if self.adapters else self.folder(n, "train"))
        return str(self.folder(0, "sft")) if self.loop.sft else self.given

    def stages(self) -> Iterator[tuple[int, Stage]]:
        """(iteration, stage)."""
        if self.loop.sft:
            yield 0, self.rows()
            yield 0, self.sft()
        yield 0, self.evaluated(0)
        for n in range(1, self.loop.iterations + 1):
            yield n, self.sampled(n)
            yield n, self.paired(n)
            yield n, self.trained(n)
            if self.adapters:
                yield n, self.merged(n)
            yield n, self.evaluated(n)

    def rows(self) -> Stage:
        """What SFT learns, with the masks of preference learning."""
        folder, loop = self.folder(0, "rows"), self.loop
        command = [sys.executable, str(ROOT / "scripts/sft_rows.py"), str(loop.sft_data), "--recipe", loop.recipe]
        command += ["--out", str(folder), *keys({"model_name_or_path": self.given, "max_length": self.max_length})]
        settings = {"recipe": loop.recipe, "sft_data": loop.sft_data, "policy": self.given}
        return Stage(folder, command, {**settings, "max_length": self.max_length}, files=(str(loop.sft_data),))

    def sft(self) -> Stage:
        """TRL's. Its last whole checkpoint is resumed, where its recipe writes any."""
        folder, loop = self.folder(0, "sft"), self.loop
        command = [*self._launcher([str(ROOT / "scripts/sft.py")]), "--config", str(loop.sft)]
        own = {"model_name_or_path": self.given, "dataset_name": str(self.folder(0, "rows")), "output_dir": str(folder)}
        last, values = last_checkpoint(folder), sft_values(Path(str(loop.sft)))
        own |= {"max_length": str(self.max_length or NO_LIMIT)}
        command += keys(own | ({"resume_from_checkpoint": str(last)} if last else {}))
        settings = {"sft": values, "sft_data": loop.sft_data, "policy": self.given, "max_length": self.max_length}
        settings |= {key: value for key, value in self.keys.items() if key in OF_LAUNCH}
        return Stage(folder, command, settings, strict=True)

    def _launcher(self, script: list[str]) -> list[str]:
        """A script in the loop's processes."""
        if self.loop.accelerate_config:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", self.loop.accelerate_config]
            return [*launch, *script]
        return [sys.executable, *script]

    def sampled(self, n: int) -> Stage:
        options = self.loop.sample  # each iteration samples with a seed of its own
        seed = {} if options.get("backend") in SERVED else {"seed": options.get("seed", 0) + n}
        return self._sampling(n, "sample", self.policy(n - 1), self.loop.tasks, {**options, **seed})

    def evaluated(self, n: int) -> Stage:
        return self._sampling(n, "evaluate", self.policy(n), self.loop.held_out_tasks, self.loop.evaluate)

    def _sampling(self, n: int, stage: str, policy: str, tasks: str, options: dict[str, Any]) -> Stage:
        folder = self.folder(n, stage)
        command = [sys.executable, str(ROOT / "scripts/sample.py"), policy, "--recipe", self.loop.recipe]
        command += [f"--model_name_or_path={policy}"]  # whose tokenizer and chat template training uses
        command += ["--tasks", tasks, "--save", str(folder / TRAJECTORIES), *flags(options)]
        chosen = {n: v for n, v in options.items() if n not in ("in_flight", "tools_at_once", "processes", *OF_SERVERS)}
        own = {key: value for key, value in self.keys.items() if key in OF_RECIPE}
        settings = {"recipe": self.loop.recipe, "tasks": tasks, "policy": policy, stage: chosen, **own}
        return Stage(folder, command, settings, files=(tasks, *code_files(options)))

    def paired(self, n: int) -> Stage:
        folder, source = self.folder(n, "pair"), self.folder(n, "sample") / TRAJECTORIES
        command = [sys.executable, str(ROOT / "scripts/pair_rollouts.py"), str(source)]
        cut = self.keys.get("truncation_mode", "drop") != "drop"
        options = {"max_length": None if cut else self.max_length, **self.loop.pair}
        command += ["--out", str(folder / PAIRS), "--replace", *flags(options)]
        return Stage(folder, command, {"pair": options})

    def trained(self, n: int) -> Stage:
        folder, loop = self.folder(n, "train"), self.loop
        mixer = json.dumps({str(self.folder(n, "pair") / PAIRS): 1.0})
        reference = {"ref_model_name_or_path": self.policy(0)} if loop.reference == "first" and n > 1 else {}
        own = {"model_name_or_path": self.policy(n - 1), **reference, "output_dir": str(folder)}
        command = [*self._launcher([str(ROOT / "run_dpo.py")]), loop.recipe, f"--dataset_mixer={mixer}"]
        command += keys({**loop.train, **own})
        settings = {"recipe": loop.recipe, **self.keys, "reference": loop.reference}

        def anew() -> list[str]:
            """What a kill left is resumed where it has a checkpoint, whatever the recipe says, and else begun anew. All
            of a checkpoint is read for that."""
            return keys({"overwrite_output_dir": newest_complete(folder)[0] is None})

        return Stage(folder, command, settings, late=anew)

    def merged(self, n: int) -> Stage:
        """A model as any other of the adapter that training wrote. What rounding leaves of the change is what the next
        stages sample, judge and train: a loop does not end with it."""
        folder, adapter = self.folder(n, "merge"), self.folder(n, "train")
        command = [sys.executable, str(ROOT / "scripts/merge_adapter.py"), str(adapter), str(folder / MODEL)]
        command.append("--keep_rounded")
        return Stage(folder, command, {"recipe": self.loop.recipe}, anew=folder / MODEL)

    def run(self, after: Callable[[int, Stage], bool]) -> None:
        """Runs what is not finished, in order. `after` each stage, finished now or earlier, says whether to go on."""
        stages = list(self.stages())
        for _, stage in stages:
            stage.finished()  # raises before anything runs
        with alone(self.out):
            for n, stage in stages:
                if not stage.finished():
                    stage.run()
                if not after(n, stage):
                    return


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another loop works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"output_dir: another loop works in {folder}.", "output_dir") from None
        yield


def figures_of(folder: Path) -> dict[str, Any]:
    """`rollout_figures` of a finished stage's trajectories, and their sampled `tokens`."""
    return stage_figures(folder / TRAJECTORIES).figures


def got_worse(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the share of right answers is below the 95 % interval of the one before, those left out whose environment
    failed; the mean reward, where no answer was right before, as where a judge gives parts of 1."""
    if not before["accuracy"] and before["reward_interval"]:
        return now["reward"] is None or now["reward"] < before["reward_interval"][0]
    return _played(now) < wilson(_played(before), before["tasks"])[0]


def _played(figures: dict[str, Any]) -> float:
    """The share of right answers among the conversations that the environment did not end."""
    played = figures["conversations"] - figures["ended"]["environment error"]
    return figures["accuracy"] * figures["conversations"] / played if played else 0.0
