"""The mathematics, as pure functions of tensors. Log-probs are sums over supervised tokens, nats, shape (B,)."""

import torch
import torch.nn.functional as F


def log_ratio(policy_logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """log π(y|x) − log π_ref(y|x), (B,). Times β it is the implicit reward (DPO, arXiv 2305.18290, eq. 5)."""
    return policy_logps - reference_logps


def sigmoid_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β Δ) with Δ = chosen − rejected log ratio, (B,). DPO eq. 7; with log-probs of the policy's own tokens
    only, it is M-DPO (arXiv 2409.02392), where the tool's tokens cancel. ln 2 where policy = reference."""
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def nll_loss(chosen_logps: torch.Tensor, chosen_tokens: torch.Tensor) -> torch.Tensor:
    """−log π(y_w|x) / |y_w| for each pair, (B,): RPO's term (arXiv 2404.19733), per supervised token."""
    return -chosen_logps / chosen_tokens.clamp(min=1)
