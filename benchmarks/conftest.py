"""Options of ``pytest benchmarks``."""

from __future__ import annotations

import pytest

from benchmarks.loss import ALONE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", nargs="+", default=["1,256,64", "2,512,64"], metavar="B,L,F", help="of the tokens (default: small)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What slows down those after it in the same process comes last.
    items.sort(key=lambda item: ALONE in item.nodeid)
