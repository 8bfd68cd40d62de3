"""Fixtures of the module's tests."""

from tests.core.threads import one_thread  # noqa: F401  (autouse)
