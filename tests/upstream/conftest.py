"""Model folders and environments for the tests of the upstream hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stock_models
import wheel_environment
from stock_models import StockModels
from wheel_environment import WheelEnvironment


@pytest.fixture(scope="session")
def stock(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> StockModels:
    """Golden model a as a model folder in every naming scheme."""
    return stock_models.write(golden("a"), tmp_path_factory.mktemp("stock-models"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], WheelEnvironment]:
    """Factory of environments with this checkout and the PaddleNLP wheel of a version."""
    environments: dict[str, WheelEnvironment] = {}

    def get(version: str) -> WheelEnvironment:
        if version not in environments:
            folder = tmp_path_factory.mktemp(f"paddlenlp-{version}")
            environments[version] = wheel_environment.make(version, folder)
        return environments[version]

    return get
