"""One file a loss. A new one joins LOSSES, the names that a recipe can choose from; the tests iterate it."""

from indexer_train.losses.base import IndexerLoss
from indexer_train.losses.bce import BceLoss
from indexer_train.losses.bpr import BprLoss
from indexer_train.losses.contrastive import ContrastiveLoss
from indexer_train.losses.focal import FocalLoss
from indexer_train.losses.listwise_mass import ListwiseMassLoss
from indexer_train.losses.listwise_peak import ListwisePeakLoss
from indexer_train.losses.margin import MarginLoss
from indexer_train.losses.vote_weighted import VoteWeightedLoss

LOSSES: dict[str, type[IndexerLoss]] = {
    "listwise_mass": ListwiseMassLoss,
    "listwise_peak": ListwisePeakLoss,
    "focal": FocalLoss,
    "bce": BceLoss,
    "vote_weighted": VoteWeightedLoss,
    "contrastive": ContrastiveLoss,
    "bpr": BprLoss,
    "margin": MarginLoss,
}


def gives_probabilities(loss: str | None) -> bool:
    """Whether a sigmoid of the scores means something: of a pointwise loss, and of one that is not known."""
    return loss not in LOSSES or LOSSES[loss].pointwise
