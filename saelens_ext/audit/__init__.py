"""The audit of a model's distribution of continuations: all stages behind one call, resumable from a folder.

Belongs here: the order of the stages and their settings. Does not: what a stage computes (``continuations``) or shows
(``report``).
"""

from saelens_ext.audit.audit import Audit, audit_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig

__all__ = ["Audit", "AuditConfig", "audit_continuations"]
