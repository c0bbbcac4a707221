"""The mathematics, as pure functions of tensors. Log-probs are sums over supervised tokens, nats, shape (B,).

Notation, for a pair of chosen y_w and rejected y_l: ratio r(y) = log π(y|x) − log π_ref(y|x); Δ = r(y_w) − r(y_l);
x = β Δ, the difference of the implicit rewards (DPO, arXiv 2305.18290, eq. 5). |y| counts supervised tokens.
"""

import math

import torch
import torch.nn.functional as F


def log_ratio(policy_logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """log π(y|x) − log π_ref(y|x), (B,). Times β it is the implicit reward (DPO, arXiv 2305.18290, eq. 5)."""
    return policy_logps - reference_logps


def divergence_score(ratio: torch.Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> torch.Tensor:
    """f′(u) at u = exp(ratio), (B,), up to a constant that cancels in a pair: what takes the ratio's place under
    another f-divergence (f-DPO, arXiv 2309.16240). `alpha` is α of the α-divergence, whose limit at 1 is reverse KL.

    reverse_kl: log u; forward_kl: 1 − 1/u; js_divergence: log 2u/(u + 1); alpha_divergence: (u^(α−1) − 1)/(α − 1).
    """
    if divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.exp(((alpha - 1) * ratio).clamp(max=80.0)).sub(1) / (alpha - 1)  # e^80 still is a float32
    return ratio


# ------------------------------------------------------------------------------------- losses of the difference x = βΔ


def sigmoid_loss(x: torch.Tensor) -> torch.Tensor:
    """−log σ(x), (B,): DPO eq. 7. With log-probs of the policy's own tokens only it is M-DPO (arXiv 2409.02392), where
    the tool's tokens cancel. ln 2 where policy = reference."""
    return -F.logsigmoid(x)


def hinge_loss(x: torch.Tensor) -> torch.Tensor:
    """max(0, 1 − x), (B,): SLiC (arXiv 2305.10425) on implicit rewards, as in RSO (arXiv 2309.06657, eq. 13)."""
    return F.relu(1 - x)


def smoothed_loss(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x), (B,): the loss where a share ε of the labels is thought to be flipped."""
    return -(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)


def robust_loss(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε), (B,): unbiased under label noise ε < ½ (rDPO, arXiv 2403.00409)."""
    return (epsilon * F.logsigmoid(-x) - (1 - epsilon) * F.logsigmoid(x)) / (1 - 2 * epsilon)


def exo_loss(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """KL(p ‖ (1 − ε, ε)) with p = (σ(x), σ(−x)), (B,): EXO for a pair (arXiv 2402.00856, eq. 16)."""
    win = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-epsilon))
    return win + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(epsilon))


def discopop_loss(x: torch.Tensor, tau: float) -> torch.Tensor:
    """−log σ(x) and e^−x, blended by s = σ(x/τ): (1 − s)(−log σ(x)) + s e^−x, (B,). DiscoPOP (arXiv 2406.08414)."""
    blend = torch.sigmoid(x / tau)
    return (1 - blend) * -F.logsigmoid(x) + blend * torch.exp(-x)


def ipo_loss(mean_delta: torch.Tensor, beta: float) -> torch.Tensor:
    """(Δ̄ − 1/(2β))², (B,), Δ̄ the difference of the two sides' mean ratios per token: IPO (arXiv 2310.12036, eq. 17),
    normalized by length as its authors do."""
    return (mean_delta - 1 / (2 * beta)) ** 2


# -------------------------------------------------------------- losses of both rewards, w = β r(y_w) and l = β r(y_l)


def nca_loss(w: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """−log σ(w) − ½ log σ(−w) − ½ log σ(−l), (B,): NCA for a pair (arXiv 2402.05369)."""
    return -F.logsigmoid(w) - (F.logsigmoid(-w) + F.logsigmoid(-l)) / 2


def bco_loss(w: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """−log σ(w) − log σ(−l), (B,): BCO (arXiv 2404.04656) with a reward shift of 0, as TRL 1.16 has it."""
    return -F.logsigmoid(w) - F.logsigmoid(-l)


def apo_zero_loss(w: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """σ(−w) + σ(l), (B,): APO-zero (arXiv 2408.06266, eq. 7). Chosen goes up, rejected down."""
    return torch.sigmoid(-w) + torch.sigmoid(l)


def apo_down_loss(w: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """σ(w) + σ(−(w − l)), (B,): APO-down (arXiv 2408.06266, eq. 8). Both go down, rejected further."""
    return torch.sigmoid(w) + torch.sigmoid(l - w)


def sppo_hard_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """(r(y_w) − 1/(2β))² + (r(y_l) + 1/(2β))², (B,): SPPO (arXiv 2405.00675, eq. 4.7) with win rates 1 and 0."""
    return (chosen_ratio - 1 / (2 * beta)) ** 2 + (rejected_ratio + 1 / (2 * beta)) ** 2


# ------------------------------------------------------------------------------------------ losses of a whole batch


def sorted_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Both sorted, then a − b, (B,): the optimal coupling of two samples (AOT, arXiv 2406.05882)."""
    return a.sort().values - b.sort().values


def token_nll(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """−Σ log π(y_w) / Σ |y_w| over the batch, expanded to (B,): the cross-entropy of supervised fine-tuning."""
    return (-logps.sum() / tokens.sum().clamp(min=1)).expand(len(logps))


# Beyond TRL: RPO's term, for each pair, per supervised token.
def nll_loss(chosen_logps: torch.Tensor, chosen_tokens: torch.Tensor) -> torch.Tensor:
    """−log π(y_w|x) / |y_w| for each pair, (B,): RPO's term (arXiv 2404.19733), per supervised token."""
    return -chosen_logps / chosen_tokens.clamp(min=1)


# Beyond TRL: losses towards a target preference p* = σ(m), m = margin_scale · margin, with p = σ(x).
# All are built from log σ, so that value and gradient stay finite however far x and m go.


def kl_loss(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ p*), (B,), nats."""
    win = torch.sigmoid(x) * (F.logsigmoid(x) - F.logsigmoid(m))
    return win + torch.sigmoid(-x) * (F.logsigmoid(-x) - F.logsigmoid(-m))


def rev_kl_loss(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """KL(p* ‖ p) up to its constant, −p* log p − (1 − p*) log(1 − p), (B,), nats."""
    return -torch.sigmoid(m) * F.logsigmoid(x) - torch.sigmoid(-m) * F.logsigmoid(-x)


def tv_loss(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """|p − p*|, (B,), as |p(1 − p*) − (1 − p)p*|, which keeps its digits where both are near 1."""
    return (torch.exp(F.logsigmoid(x) + F.logsigmoid(-m)) - torch.exp(F.logsigmoid(-x) + F.logsigmoid(m))).abs()


def hellinger_loss(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """½[(√p − √p*)² + (√(1−p) − √(1−p*))²], (B,): the squared Hellinger distance."""
    root = {s: torch.exp(F.logsigmoid(s * x) / 2) - torch.exp(F.logsigmoid(s * m) / 2) for s in (1, -1)}
    return (root[1] ** 2 + root[-1] ** 2) / 2


def kto_pair_loss(w: torch.Tensor, l: torch.Tensor, kl_w: torch.Tensor, kl_l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """½ (σ(−(w − kl_l)) + σ(−(kl_w − l))), (B,): KTO on pairs (arXiv 2402.01306, eq. 7), where each half's baseline is
    the other half's: `kl_w`, `kl_l` = β max(0, mean ratio) over all ranks, scalars, without gradient."""
    return (torch.sigmoid(kl_l - w) + torch.sigmoid(l - kl_w)) / 2
