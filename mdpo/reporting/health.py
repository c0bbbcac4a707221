"""Warnings of a policy that breaks while its margins grow, by what a log history shows. docs/healthy-runs.md has the
runs that the thresholds are from."""

from typing import Any

from mdpo.reporting.log_history import FALL, fall_of, moved

TOKEN_FALL = 0.1  # nats a token: exp(-0.1), chosen tokens are a tenth less likely
STOP_FALL = 0.5  # nats a turn: exp(-0.5), the policy ends its turns 0.6 times as often where it should
ADVICE = (
    "A lower learning_rate, a higher beta or nll_coefficient (RPO) work against it. Sample the policy with "
    "scripts/sample.py before you trust the pairs (docs/healthy-runs.md)."
)


def health_warnings(history: list[dict[str, Any]], beta: float) -> list[str]:
    """A line for each sign that the policy breaks, ADVICE last; none for a healthy run. From the first and the last
    evaluation of held-out pairs, without two from training's distance to the reference."""
    lines = []
    fall, where = fall_of(history, "logps_per_token/chosen", "log_ratios_per_token/chosen")
    if fall > TOKEN_FALL:
        lines.append(
            f"chosen tokens grew less likely by {fall:.2f} nats a token ({where}; more than {TOKEN_FALL} is a warning)."
        )
    fall, where = fall_of(history, "stop_logps/chosen", "stop_log_ratios/chosen")
    if fall > STOP_FALL:
        lines.append(
            f"the policy no longer ends its turns as surely: the stop tokens of chosen turns fell by {fall:.2f} nats a "
            f"turn ({where}; more than {STOP_FALL} is a warning)."
        )
    sides = moved(history, beta)
    if sides is not None and sides.fell:
        why = (
            "the margin grows only because rejected falls faster"
            if sides.rejected < sides.chosen
            else "rejected does not fall as fast, and the margin shrinks"
        )
        lines.append(
            f"the chosen side grew less likely by {-sides.chosen:.2f} nats a pair (more than {FALL:.0%} of its log-"
            f"prob is a warning): {why}."
        )
    return [*lines, ADVICE] if lines else []
