"""The tests' own list of what differs between PyTorch's versions."""

from __future__ import annotations

import versions


def test_the_newest_has_everything() -> None:
    """A name that PyTorch has changed must not skip its tests in silence."""
    missing = [feature for feature, there in versions.LATER.items() if not there]
    if versions.PYTORCH >= (2, 15):
        assert not missing, missing
    if versions.PYTORCH <= (2, 6):
        assert set(versions.LATER) - set(missing) <= {"compile_context"}, missing
