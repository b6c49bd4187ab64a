"""What the paper reports (arXiv:2506.19164v1, Tables II to IV) and what it leaves open."""

from __future__ import annotations

from typing import Final

# arm -> batch size -> training loss after round 1 and round 15 (Table II, Figure 1)
TRAINING_LOSS: Final[dict[str, dict[int, tuple[float, float]]]] = {
    "federated": {4: (1.36, 0.22), 8: (1.33, 0.11)},
    "central-steps": {4: (1.31, 0.31), 8: (1.39, 0.15)},
    "local": {4: (1.61, 0.45), 8: (1.52, 0.31)},
}
PERPLEXITY: Final = {"central-steps": 15.36, "federated": 16.78, "local": 19.20}  # Table III
BLEU: Final = {"central-steps": 0.55, "federated": 0.55, "local": 0.47}  # Table III
SECONDS: Final = {"federated": 4.3, "central-steps": 6.7, "local": 4.1}  # Table IV, no unit given

DIFFERS: Final[dict[str, str]] = {
    "II": (
        "The paper does not say on which text its training loss is measured, at which learning "
        "rate, nor how many steps make a round. Here: nats per answer token of the round's own "
        "training batches, each before its step (client), and of the resulting adapter on all "
        "training text, on dev and on held-out text."
    ),
    "III": (
        "A loss of 0.11 to 0.31 and a perplexity of 15 to 19 (2.73 to 2.95 nats) cannot be of one "
        "text. Here: exp of the token-weighted loss on held-out text; sacrebleu's corpus BLEU (0 "
        "to 100, and the paper's scale of 0 to 1 beside it) and chrF of greedy replies, on "
        "held-out prompts and on training prompts apart. The paper has one number for an arm, "
        "whatever the batch size."
    ),
    "IV": (
        "The paper gives no unit, and its three numbers fit a fixed part of 3.45 beside the "
        "training: mostly the model's loading. Here: seconds of a round without loading the base, "
        "by phase, with participants side by side (the phases are the slowest one's) and in turn "
        "(all of them). Participants hold out no text here, so none evaluates: adapters are "
        "measured outside of rounds. Transfer is the run's mean by round. Time in which an "
        "interrupted run did not run is left out, unless it was aggregating. Peak: resident "
        "memory of the one process that holds the base, all participants and the coordinator."
    ),
}
CLAIMS: Final = (
    "global + mean(local - global) = mean(local): the rule is FedAvg with equal weights, and "
    "cannot by itself lower a loss."
)
