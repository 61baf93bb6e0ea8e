"""What does lookahead sparse attention save? Bytes and FLOPs of any configuration, computed term by term."""

from eval.plan.plan import Plan, make_plan
from eval.plan.settings import PlanSettings

__all__ = ["Plan", "PlanSettings", "make_plan"]
