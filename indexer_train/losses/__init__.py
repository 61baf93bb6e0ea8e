"""One class a loss; the registry is the list of names a recipe can choose from."""

from indexer_train.losses.base import IndexerLoss
from indexer_train.losses.focal import FocalLoss
from indexer_train.losses.listwise_mass import ListwiseMassLoss
from indexer_train.losses.listwise_peak import ListwisePeakLoss

LOSSES: dict[str, type[IndexerLoss]] = {
    "listwise_mass": ListwiseMassLoss,
    "listwise_peak": ListwisePeakLoss,
    "focal": FocalLoss,
}
