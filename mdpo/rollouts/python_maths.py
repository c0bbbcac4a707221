"""Python as a tool: a program is run in the sandbox, and what it printed comes back."""

from collections.abc import Callable

from mdpo.rollouts.episode import Outcome, shortened
from mdpo.rollouts.sandbox import RunResult, Sandbox

OUTPUT_CHARACTERS = 2000  # of an output that are shown to the policy: the first and the last half
LIMITS = {"timeout": "TimeoutError: the time limit was reached\n", "flood": "OSError: too much output\n"}


def python_tool(sandbox: Sandbox) -> Callable[[str], str]:
    """The tool `python`, whose outcomes are `RunResult.ended`."""

    def python(code: str) -> str:
        """
        Runs a Python program and returns what it prints. Nothing is left of earlier programs.

        Args:
            code: The program.
        """
        run = sandbox.run(code)
        return Outcome.of(shown_output(run), run.ended)

    return python


def shown_output(run: RunResult) -> str:
    """What was printed, and which limit ended the program, if one did."""
    text = shortened(run.output, OUTPUT_CHARACTERS)
    limit = LIMITS.get(run.ended, "")
    return text + "\n" * (limit != "" and text != "" and not text.endswith("\n")) + limit
