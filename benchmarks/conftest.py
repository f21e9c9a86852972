"""Options of ``pytest benchmarks``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", nargs="+", default=["1,256,64", "2,512,64"], metavar="B,L,F", help="of the tokens (default: small)"
    )
