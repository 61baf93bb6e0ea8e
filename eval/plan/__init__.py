"""What does lookahead sparse attention save? Bytes and FLOPs of any configuration, computed term by term."""

from eval.plan.plan import CapacityPlan, PlanSettings, make_plan

__all__ = ["CapacityPlan", "PlanSettings", "make_plan"]
