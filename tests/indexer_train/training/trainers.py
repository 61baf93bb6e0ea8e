"""The trainer that `train` runs, to be watched or stopped."""

from indexer_train.training.trainer import prepare, stock_trainer


def make_trainer(store, shape, config, out):
    return stock_trainer(prepare(store, shape, config, out), config, out)
