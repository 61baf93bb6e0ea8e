"""Ways on behind a prompt, each policy's by name, in step."""

import torch

from eval.online.cycle import Course, go_on
from eval.online.online_policies import ONLINE_POLICIES, Circumstances, Foresight, best


def keeps(indexer, share):
    """What `lookahead decode` compares: full attention, and all that rank what they have seen."""
    given = Circumstances(indexer, Foresight(indexer.spec.window), share)
    seeing = [each for each in ONLINE_POLICIES if each.under == "budgets" and not each.foresees and not each.corrects]
    ranked = [each for each in seeing if each.has(indexer)]
    return {"full": None} | {each.name: each.keep(given) for each in ranked}


def ranked(share, **scores):
    """Keeps the best by these scores."""
    return {name: best(score, share) for name, score in scores.items()}


def written(session, keeps, tau, first, most, ended=lambda answer: False):
    """name -> (answer, course)."""
    courses = {name: Course(session.fork(), keep, [first], most, ended) for name, keep in keeps.items()}
    go_on(list(courses.values()), tau)
    return {name: (course.answer, course) for name, course in courses.items()}


def followed(session, keeps, tau, tokens):
    """name -> (logits [len(tokens), vocabulary], course)."""
    courses = {name: Course(session.fork(), keep, tokens) for name, keep in keeps.items()}
    seen = {name: [] for name in keeps}
    for name, course in courses.items():
        course.watchers.append(lambda session, logits, name=name: seen[name].append(logits))
    go_on(list(courses.values()), tau)
    return {name: (torch.stack(seen[name]), course) for name, course in courses.items()}
