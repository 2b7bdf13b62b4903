"""All cases of the audit, by name."""

from tests.audit.healthy import HEALTHY
from tests.audit.runs import Case
from tests.audit.sick import SICK

CASES = (*HEALTHY, *SICK)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
