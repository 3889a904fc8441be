"""What a rank tells its supervisor, and what it is told in return."""

from __future__ import annotations

from collections.abc import Callable

SendReport = Callable[[bytes], bytes]
"""Takes a serialised ReportRequest, answers with a serialised ReportReply; blocks until the supervisor has it."""
