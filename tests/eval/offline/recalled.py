"""Rows of recall of one indexer at one threshold."""

from eval.offline.recall import by_task, measure, recall_rows
from eval.report.rows import RecallRow
from indexer_train.selection import Cut, Threshold


def evaluate_recall(indexer, store, golden, threshold, every_token=False):
    given = {"indexer": [Threshold(cuts=[Cut(score=threshold)])]}
    return recall_rows(list(measure({"indexer": indexer}, store, golden, given, every_token)), RecallRow, by_task)
