"""Services of tests that look at what a service logs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serving import Serving


@pytest.fixture
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One service for each test, with all its log records."""
    with Serving(tmp_path_factory.mktemp("run"), log_level="debug") as serving:
        yield serving


@pytest.fixture(scope="module")
def shared_serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One service for all tests of a module, with its log records from `info` on."""
    with Serving(tmp_path_factory.mktemp("run"), log_level="info") as serving:
        yield serving
