from __future__ import annotations

import pytest
from tests.commands.browser import Browser


@pytest.fixture
def launch(tmp_path):
    """Function that starts one person's browser and closes the one before."""
    running = []

    def start() -> Browser:
        while running:
            running.pop().close()
        running.append(Browser(tmp_path / "profile"))
        return running[0]

    yield start
    for browser in running:
        browser.close()
