"""What a model will need before any of it is loaded: tokens, whether they fit, and memory.

Only config.json and the headers of the weight files are read; no weight is.
"""

from vidlm.plan.account import ANSWER_TOKENS, PROMPT_TOKENS, Plan, TextShape, VisionShape
from vidlm.plan.checkpoint import Loading, unpacked_bytes
from vidlm.plan.reckon import check_room, fit, free_memory, plan, sampling

__all__ = [
    "ANSWER_TOKENS",
    "PROMPT_TOKENS",
    "Loading",
    "Plan",
    "TextShape",
    "VisionShape",
    "check_room",
    "fit",
    "free_memory",
    "plan",
    "sampling",
    "unpacked_bytes",
]
