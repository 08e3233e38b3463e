"""Same or different: thresholds, decisions about pairs, and reports."""

from tripletjax.apps.verification.decision import Decision, decide
from tripletjax.apps.verification.evaluation import FAR, Verification, evaluate
from tripletjax.apps.verification.protocol import folder_of

__all__ = ["FAR", "Decision", "Verification", "decide", "evaluate", "folder_of"]
