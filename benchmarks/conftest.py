"""Options of ``pytest benchmarks``."""

from __future__ import annotations

import pytest

from benchmarks.loss import ALONE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", nargs="+", default=["1,256,64", "2,512,64"], metavar="B,L,F", help="of the tokens (default: small)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The variant that slows down later ones in the same process runs last.
    items.sort(key=lambda item: ALONE in item.nodeid)
