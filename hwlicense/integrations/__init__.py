"""Models of frameworks out of a package, in memory alone: one module for each framework, the only importers of them.

Importing such a module raises UsageError EXTRA_MISSING where its framework is not installed, and EXTRA_UNSUPPORTED for
a version of it that lacks what is needed. Errors of the framework's own come through as they are, but for malformed
members, which are named.
"""

from hwlicense.integrations.metering import metered

__all__ = ["metered"]
