"""The audit of a model's distribution of continuations: all stages behind one call, resumable from a folder.

Belongs here: many prefixes, by one process or several, and what was found of them. Does not: the stages of one prefix
(``continuations/audit_stages``), or how a page is drawn (``report``).
"""

from saelens_ext.audit.audit import Audit, audit_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig

__all__ = ["Audit", "AuditConfig", "audit_continuations"]
