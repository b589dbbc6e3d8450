"""What all tests of loaders share."""

from __future__ import annotations

import pytest

from ferkd_data.loader.processes import Helper


@pytest.fixture(autouse=True, scope="session")
def helper():
    """Kept for the session, so that the loaders of all tests have workers in no time."""
    return Helper.shared()
